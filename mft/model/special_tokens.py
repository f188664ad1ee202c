"""Resolves the EOS and padding tokens, and adds new tokens with trained rows.

New tokens are added to the tokenizer, given rows in the embedding and the output layer, and trained.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mft.errors import UserError, nearest
from mft.model.introspect import full_shape, is_tied

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

PADS = ("<pad>", "<|pad|>", "[PAD]", "<|padding|>", "<|finetune_right_pad_id|>", "<|finetune_right_pad|>")
"""What vocabularies call a token made for padding where their tokenizer does not name it (Pythia, Llama
3.1)."""

NEW_ROWS = "mft_new_rows"
"""Attribute of a loaded model: the rows of its embedding that no checkpoint has trained, those of new tokens
and those that fill it up."""


def set_special_tokens(
    tokenizer: PreTrainedTokenizerBase,
    eos: str | None,
    pad: str | None,
    config_ids: Callable[[], Any],
    path: str,
) -> None:
    """Sets a tokenizer's EOS and pad token.

    EOS: `eos`, else the tokenizer's, else the model's (config_ids returns eos_token_id of its config: an id,
    several or None). Pad: `pad`, else the tokenizer's, else one made for it (PADS), else unk, else EOS. path:
    of the model, for messages. Raises UserError where no EOS is known, and for tokens that the vocabulary
    does not have.
    """
    end = eos or tokenizer.eos_token or _of_config(tokenizer, config_ids(), path)
    if end is None:
        raise UserError(
            f"model.eos_token: neither the tokenizer nor config.json of {path} names a token that ends an "
            "answer; set it here"
        )
    tokenizer.eos_token = require_token(tokenizer, str(end), "model.eos_token")
    # Padding is tracked by sample_BT, never by id: a pad token that equals EOS hides no trained EOS here. It
    # still matters to whoever loads the checkpoint and masks by id, so EOS is the last choice.
    vocabulary = tokenizer.get_vocab()
    made = next((token for token in PADS if token in vocabulary), None)
    fill = pad or tokenizer.pad_token or made or tokenizer.unk_token or end
    tokenizer.pad_token = require_token(tokenizer, str(fill), "model.pad_token")


def _of_config(tokenizer: PreTrainedTokenizerBase, ids: Any, path: str) -> str | None:
    """Returns the token of the first of the ids that the vocabulary has; None for no ids."""
    given = as_ids(ids)
    tokens = [token for token in map(tokenizer.convert_ids_to_tokens, given) if token is not None]
    if given and not tokens:
        raise UserError(
            f"config.json of {path}: eos_token_id={ids} is outside the vocabulary of its tokenizer, which "
            f"has {len(tokenizer)} tokens; name the token that ends an answer with model.eos_token"
        )
    return str(tokens[0]) if tokens else None


def as_ids(ids: Any) -> list[int]:
    """Returns an eos_token_id, which may be one, several or none, as a list."""
    several = ids if isinstance(ids, Sequence) and not isinstance(ids, str) else [ids]
    return [i for i in several if isinstance(i, int)]


def require_token(tokenizer: PreTrainedTokenizerBase, token: str, key: str) -> str:
    """Returns `token` if the vocabulary has it; assigning an unknown one would silently train on the unk
    token."""
    vocabulary = tokenizer.get_vocab()
    if token not in vocabulary:
        special = [str(t) for t in tokenizer.all_special_tokens] + list(tokenizer.get_added_vocab())
        raise UserError(
            f"{key}={token!r} is not in the tokenizer's vocabulary; its special tokens are "
            f"{', '.join(dict.fromkeys(special)) or 'none'}{nearest(token, vocabulary)}"
        )
    return token


def check_new_tokens(plain: Sequence[str], special: Sequence[str]) -> None:
    """Raises UserError for lists of tokens that no tokenizer can take."""
    for key, tokens in (("add_tokens", plain), ("add_special_tokens", special)):
        for token in tokens:
            if not isinstance(token, str) or not token.strip():
                raise UserError(f"model.{key}: {token!r} is not a token; give texts that are not blank")
    every = [*plain, *special]
    twice = sorted({token for token in every if every.count(token) > 1})
    if twice:
        raise UserError(f"model.add_tokens and model.add_special_tokens name {twice[0]!r} more than once")


def add_new_tokens(
    tokenizer: PreTrainedTokenizerBase, plain: Sequence[str], special: Sequence[str]
) -> list[int]:
    """Adds tokens to a tokenizer and returns their ids; text is matched as it stands, before any
    normalisation.

    Raises UserError for one that is in the vocabulary already.
    """
    from transformers import AddedToken

    vocabulary = tokenizer.get_vocab()
    for key, tokens in (("add_tokens", plain), ("add_special_tokens", special)):
        for token in tokens:
            if token in vocabulary:
                raise UserError(
                    f"model.{key}: {token!r} is in the vocabulary already, as {vocabulary[token]}; remove it"
                )
        tokenizer.add_tokens([AddedToken(t, normalized=False, special=tokens is special) for t in tokens])
    vocabulary = tokenizer.get_vocab()
    return [vocabulary[token] for token in (*plain, *special)]


def widen_embeddings(model: Any, ids: Sequence[int], multiple: int) -> None:
    """Gives a plain model rows for the ids, its size a multiple of `multiple` if it has to grow.

    All rows that are new begin as the mean of the trained ones: a row of zeros or noise would be as likely as
    any token. It is computed, not drawn, so a base that is widened again is the same.
    """
    import torch

    rows = full_shape(model.get_input_embeddings().weight)[0]
    trained, needed = min(min(ids), rows), max(ids) + 1
    if needed > rows:
        model.resize_token_embeddings(math.ceil(needed / multiple) * multiple, mean_resizing=False)
    size = full_shape(model.get_input_embeddings().weight)[0]
    new = sorted({*ids, *range(rows, size)})
    embeddings = [model.get_input_embeddings()] + ([] if is_tied(model) else [model.get_output_embeddings()])
    with torch.no_grad():
        for layer in embeddings:
            for values in (layer.weight, getattr(layer, "bias", None)):
                if values is not None:
                    values[new] = values[:trained].float().mean(0).to(values.dtype)
    setattr(model, NEW_ROWS, new)


def trained_rows(base: Any, saved: Sequence[str]) -> dict[str, list[int]] | None:
    """Returns `trainable_token_indices` of a LoraConfig for a model that was widened, None for any other.

    saved: paths of modules trained in full, which need none. An embedding's adapter holds the new rows alone:
    what is trained, kept by the optimizer and saved is a row a token. Raises UserError for an output layer
    that peft would compute differently.
    """
    from torch import nn

    new = getattr(base, NEW_ROWS, None)
    if not new:
        return None
    head = base.get_output_embeddings()
    paths = {id(module): path for path, module in base.named_modules()}
    embeddings = {paths[id(layer)]: layer for layer in (base.get_input_embeddings(), head)}
    left = {path: layer for path, layer in embeddings.items() if path not in saved}
    if head in left.values() and (type(head) is not nn.Linear or head.bias is not None):
        raise UserError(
            f"model.add_tokens: the output layer of {type(base).__name__} is more than a matrix, so single "
            "rows of it cannot be trained; train it in full with "
            f"peft.modules_to_save=[{paths[id(head)]}], or use peft=full"
        )
    if is_tied(base):  # peft ties the other one by itself
        left = {path: layer for path, layer in left.items() if layer is not head}
    return dict.fromkeys(left, new) or None


def check_same_tokens(base: Any, adapter: Path) -> None:
    """Raises UserError unless an adapter to start from was trained with the new tokens of `base`, or with
    none."""
    config = json.loads((adapter / "adapter_config.json").read_text(encoding="utf-8"))
    indices = config.get("trainable_token_indices") or {}
    theirs = {row for rows in (indices.values() if isinstance(indices, dict) else [indices]) for row in rows}
    ours = set(getattr(base, NEW_ROWS, ()))
    saved = {path.rpartition(".")[2] for path in config.get("modules_to_save") or ()}
    embedding = next(n for n, m in base.named_modules() if m is base.get_input_embeddings())
    if not theirs and (not ours or embedding.rpartition(".")[2] in saved):
        return
    if theirs != ours or max(theirs) >= full_shape(base.get_input_embeddings().weight)[0]:
        raise UserError(
            f"peft.path={adapter} was trained with {len(theirs) or 'no'} new rows of the embedding, not with "
            f"{len(ours) or 'none'}: give the same model.add_tokens and model.add_special_tokens as its run"
        )
