"""Resolves the EOS and padding tokens, and adds new tokens with trained rows.

New tokens are added to the tokenizer, given rows in the embedding and the output layer, and trained.
"""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mft.errors import UserError, nearest
from mft.model.introspect import full_shape, is_tied

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

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
    config: Callable[[], PreTrainedConfig],
    path: str,
) -> None:
    """Sets a tokenizer's EOS and pad token.

    EOS: `eos`, else the tokenizer's, else that of the model's config. Pad: `pad`, else the tokenizer's, else
    one made for it (PADS), else unk, else EOS. path: of the model, for messages. Raises UserError where no
    EOS is known, and for tokens that the vocabulary does not have.
    """
    eos = eos or tokenizer.eos_token or _config_eos(tokenizer, config(), path)
    vocabulary = tokenizer.get_vocab()
    # Padding is tracked by sample_BT, never by id: a pad token that equals EOS hides no trained EOS here. It
    # still matters to whoever loads the checkpoint and masks by id, so EOS is the last choice.
    for_padding = next((token for token in PADS if token in vocabulary), None)
    pad = pad or tokenizer.pad_token or for_padding or tokenizer.unk_token or eos
    for name, token in (("eos_token", str(eos)), ("pad_token", str(pad))):
        # transformers would take an unknown token, and train on unk
        if token not in vocabulary:
            special = dict.fromkeys([*tokenizer.all_special_tokens, *tokenizer.get_added_vocab()])
            raise UserError(
                f"model.{name}={token!r} is not in the tokenizer's vocabulary; its special tokens are "
                f"{', '.join(special) or 'none'}{nearest(token, vocabulary)}"
            )
        setattr(tokenizer, name, token)


def _config_eos(tokenizer: PreTrainedTokenizerBase, config: PreTrainedConfig, path: str) -> str:
    """Returns the token of the first of the config's eos_token_id that the vocabulary has."""
    ids = as_ids(getattr(config, "eos_token_id", None))
    tokens = [token for token in map(tokenizer.convert_ids_to_tokens, ids) if token is not None]
    if not ids:
        raise UserError(
            f"model.eos_token: neither the tokenizer nor config.json of {path} names a token that ends an "
            "answer; set it here"
        )
    if not tokens:
        raise UserError(
            f"config.json of {path}: eos_token_id={config.eos_token_id} is outside the vocabulary of its "
            f"{len(tokenizer)} tokens; name the token that ends an answer with model.eos_token"
        )
    return str(tokens[0])


def as_ids(ids: object) -> list[int]:
    """Returns an eos_token_id, which may be one, several or none, as a list."""
    several = ids if isinstance(ids, Sequence) and not isinstance(ids, str) else [ids]
    return [i for i in several if isinstance(i, int)]


def check_new_tokens(plain: Sequence[str], special: Sequence[str]) -> None:
    """Raises UserError for lists of tokens that no tokenizer can take."""
    tokens = [*plain, *special]
    for token in tokens:
        if not isinstance(token, str) or not token.strip():
            key = "add_tokens" if token in plain else "add_special_tokens"
            raise UserError(f"model.{key}: {token!r} is not a token; give texts that are not blank")
        if tokens.count(token) > 1:
            raise UserError(f"model.add_tokens and model.add_special_tokens name {token!r} more than once")


def add_new_tokens(
    tokenizer: PreTrainedTokenizerBase, plain: Sequence[str], special: Sequence[str]
) -> list[int]:
    """Adds tokens to a tokenizer and returns their ids; text is matched as it stands, before any
    normalisation.

    Raises UserError for one that is in the vocabulary already.
    """
    from transformers import AddedToken

    for key, tokens in (("add_tokens", plain), ("add_special_tokens", special)):
        vocabulary = tokenizer.get_vocab()
        for token in tokens:
            if token in vocabulary:
                where = f"in the vocabulary already, as {vocabulary[token]}"
                raise UserError(f"model.{key}: {token!r} is {where}; remove it")
        is_special = key == "add_special_tokens"
        tokenizer.add_tokens([AddedToken(t, normalized=False, special=is_special) for t in tokens])
    vocabulary = tokenizer.get_vocab()
    return [vocabulary[token] for token in (*plain, *special)]


def widen_embeddings(model: PreTrainedModel, ids: Sequence[int], multiple: int) -> None:
    """Gives a plain model rows for the ids, its size a multiple of `multiple` if it has to grow.

    All rows that are new begin as the mean of the trained ones: a row of zeros or noise would be as likely as
    any token. It is computed, not drawn, so a base that is widened again is the same.
    """
    import torch

    rows = full_shape(model.get_input_embeddings().weight)[0]
    trained, needed = min(min(ids), rows), max(ids) + 1
    # Many models have spare rows, which a new token takes before the embedding has to grow.
    if needed > rows:
        model.resize_token_embeddings(math.ceil(needed / multiple) * multiple, mean_resizing=False)
    size = full_shape(model.get_input_embeddings().weight)[0]
    new = sorted({*ids, *range(rows, size)})
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    tensors: list[Any] = [embedding.weight]
    if not is_tied(model):
        tensors += [head.weight, getattr(head, "bias", None)]
    with torch.no_grad():
        for values in tensors:
            if values is not None:
                values[new] = values[:trained].float().mean(0).to(values.dtype)
    setattr(model, NEW_ROWS, new)


def trained_rows(base: PreTrainedModel, saved: Sequence[str]) -> dict[str, list[int]] | None:
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
    by_rows = {path: layer for path, layer in embeddings.items() if path not in saved}
    if head in by_rows.values() and (type(head) is not nn.Linear or head.bias is not None):
        raise UserError(
            f"model.add_tokens: the output layer of {type(base).__name__} is not just a matrix, so some rows "
            f"cannot be trained; train all with peft.modules_to_save=[{paths[id(head)]}], or use peft=full"
        )
    if is_tied(base):
        by_rows.pop(paths[id(head)], None)  # peft ties the other one by itself
    return dict.fromkeys(by_rows, new) or None


def check_same_tokens(base: PreTrainedModel, adapter: Path) -> None:
    """Raises UserError unless an adapter to start from was trained with the new tokens of `base`, or with
    none."""
    config = json.loads((adapter / "adapter_config.json").read_text(encoding="utf-8"))
    indices = config.get("trainable_token_indices") or {}
    # peft writes rows by module, and a list for all embeddings
    theirs = set(itertools.chain(*(indices.values() if isinstance(indices, dict) else [indices])))
    ours = set(getattr(base, NEW_ROWS, ()))
    saved = {path.rpartition(".")[2] for path in config.get("modules_to_save") or ()}
    embedding = next(n for n, m in base.named_modules() if m is base.get_input_embeddings())
    # An adapter without new rows has nothing to disagree about, unless this base has some that it would not
    # train; an embedding in modules_to_save holds them all.
    if not theirs and (not ours or embedding.rpartition(".")[2] in saved):
        return
    if theirs != ours or max(theirs) >= full_shape(base.get_input_embeddings().weight)[0]:
        raise UserError(
            f"peft.path={adapter} was trained with {len(theirs) or 'no'} new rows of the embedding, not with "
            f"{len(ours) or 'none'}: give the same model.add_tokens and model.add_special_tokens as its run"
        )
