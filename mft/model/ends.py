"""The tokens that end an answer and that fill rows: which they are."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from mft.errors import UserError, nearest

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

PADS = ("<pad>", "<|pad|>", "[PAD]", "<|padding|>", "<|finetune_right_pad_id|>", "<|finetune_right_pad|>")
"""What vocabularies call a token made for padding where their tokenizer does not name it (Pythia, Llama 3.1)."""


def settle(
    tokenizer: PreTrainedTokenizerBase,
    eos: str | None,
    pad: str | None,
    config_ids: Callable[[], Any],
    path: str,
) -> None:
    """Sets a tokenizer's EOS and pad token.

    EOS: `eos`, else the tokenizer's, else the model's (config_ids returns eos_token_id of its config: an id, several or
    None). Pad: `pad`, else the tokenizer's, else one made for it (PADS), else unk, else EOS. path: of the model, for
    messages. Raises UserError where no EOS is known, and for tokens that the vocabulary does not have.
    """
    end = eos or tokenizer.eos_token or _of_config(tokenizer, config_ids(), path)
    if end is None:
        raise UserError(
            f"model.eos_token: neither the tokenizer nor config.json of {path} names a token that ends an answer; set "
            "it here"
        )
    tokenizer.eos_token = known_token(tokenizer, str(end), "model.eos_token")
    # Padding is tracked by sample_BT, never by id: a pad token that equals EOS hides no trained EOS here. It still
    # matters to whoever loads the checkpoint and masks by id, so EOS is the last choice.
    vocabulary = tokenizer.get_vocab()
    made = next((token for token in PADS if token in vocabulary), None)
    fill = pad or tokenizer.pad_token or made or tokenizer.unk_token or end
    tokenizer.pad_token = known_token(tokenizer, str(fill), "model.pad_token")


def _of_config(tokenizer: PreTrainedTokenizerBase, ids: Any, path: str) -> str | None:
    """Returns the token of the first of the ids that the vocabulary has; None for no ids."""
    given = listed(ids)
    found = [token for token in map(tokenizer.convert_ids_to_tokens, given) if token is not None]
    if given and not found:
        raise UserError(
            f"config.json of {path}: eos_token_id={ids} is outside the vocabulary of its tokenizer, which has "
            f"{len(tokenizer)} tokens; name the token that ends an answer with model.eos_token"
        )
    return str(found[0]) if found else None


def listed(ids: Any) -> list[int]:
    """Returns an eos_token_id, which may be one, several or none, as a list."""
    several = ids if isinstance(ids, Sequence) and not isinstance(ids, str) else [ids]
    return [i for i in several if isinstance(i, int)]


def known_token(tokenizer: PreTrainedTokenizerBase, token: str, key: str) -> str:
    """Returns `token` if the vocabulary has it; assigning an unknown one would silently train on the unk token."""
    vocabulary = tokenizer.get_vocab()
    if token not in vocabulary:
        special = [str(t) for t in tokenizer.all_special_tokens] + list(tokenizer.get_added_vocab())
        raise UserError(
            f"{key}={token!r} is not in the tokenizer's vocabulary; its special tokens are "
            f"{', '.join(dict.fromkeys(special)) or 'none'}{nearest(token, vocabulary)}"
        )
    return token
