"""Messages → token ids, the same for training and inference, and what happens to samples that are too long.

Shapes: S tokens of one conversation, P segments of all conversations of a call.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from itertools import pairwise
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import xxhash

from mft.batch import Message
from mft.data.settings import DataSettings, LongSamples
from mft.data.template import Segment, Template
from mft.data.template_choice import of_tokenizer
from mft.errors import UserError

if TYPE_CHECKING:
    from tokenizers import Tokenizer
    from transformers import PreTrainedTokenizerBase

Encoded = tuple[np.ndarray, np.ndarray]
"""ids_S int32, trained_S bool: which of them carry loss."""


class Encoder:
    """Encodes conversations segment by segment; the end of sequence enters as its id, not as text.

    No token is added at the start: a template that wants a BOS writes it. A first token may be marked as
    trained (in plain text every token is), though nothing comes before it to predict it.

    Raises UserError for a tokenizer without an end-of-sequence token: without it no answer would ever end.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, template: Template):
        if tokenizer.eos_token_id is None:
            raise UserError(
                "model.eos_token: the tokenizer has no end-of-sequence token, so answers would never end; "
                "name one of its tokens, e.g. model.eos_token='<|endoftext|>'"
            )
        self.tokenizer, self.template = tokenizer, template
        self.eos_id = int(tokenizer.eos_token_id)
        # Ids may have gaps, and len() counts what was added: the largest id decides the width of the cache.
        largest_id = max(tokenizer.get_vocab().values(), default=0)
        self.vocab_size = max(largest_id + 1, len(tokenizer), self.eos_id + 1)

    @classmethod
    def saved(cls, tokenizer: PreTrainedTokenizerBase) -> Encoder:
        """Returns the encoder with which the model of a saved tokenizer was trained, by its chat template.

        Raises UserError for a tokenizer without a chat template, or with one that cannot be trained with.
        """
        return cls(tokenizer, of_tokenizer(tokenizer))

    def encode(self, messages: Sequence[Message]) -> Encoded:
        """Returns the training ids of one conversation."""
        return self.encode_segments([self.template.segments(messages)])[0]

    def encode_prompt(self, messages: Sequence[Message]) -> list[int]:
        """Returns the ids after which the model is to answer: a prefix of the conversation's training ids."""
        ids_S, _ = self.encode_segments([self.template.segments(messages, generation=True)])[0]
        return ids_S.tolist()

    def fingerprint(self) -> str:
        """Returns a hash of all that decides the ids: tokenizer, its special tokens, template."""
        # The Rust tokenizer's own state, since files of the same name and version may differ.
        if self.tokenizer.is_fast:
            state = self._backend().to_str()
        else:
            state = json.dumps(sorted(self.tokenizer.get_vocab().items()))
        special = json.dumps(self.tokenizer.special_tokens_map, sort_keys=True, default=str)
        parts = [type(self.tokenizer).__name__, state, special, str(self.eos_id), self.template.fingerprint()]
        return xxhash.xxh3_128_hexdigest("\0".join(parts).encode())

    def encode_segments(self, conversations: Sequence[Sequence[Segment]]) -> list[Encoded]:
        """Encodes conversations given in segments in one call of the tokenizer, which uses all cores.

        The arrays are views of two flat ones: thousands of small ones would cost more than the encoding.
        """
        segments = [segment for conversation in conversations for segment in conversation]
        flat: list[int] = []
        length_P = []
        for segment, ids in zip(segments, self._ids([segment.text for segment in segments]), strict=True):
            flat += ids
            if segment.eos:
                flat.append(self.eos_id)
            length_P.append(len(ids) + segment.eos)
        ids_all = np.array(flat, dtype=np.int32)
        trained_all = np.repeat(np.array([segment.trained for segment in segments], dtype=bool), length_P)
        token_border_P = np.cumsum([0, *length_P])
        first_segment = np.cumsum([0, *map(len, conversations)])
        borders = token_border_P[first_segment].tolist()
        return [(ids_all[start:stop], trained_all[start:stop]) for start, stop in pairwise(borders)]

    def _ids(self, texts: list[str]) -> Iterable[list[int]]:
        if not texts:
            return []
        if self.tokenizer.is_fast:
            return (e.ids for e in self._backend().encode_batch_fast(texts, add_special_tokens=False))
        return self.tokenizer(texts, add_special_tokens=False)["input_ids"]

    def _backend(self) -> Tokenizer:
        """Returns the Rust tokenizer, without the truncation or padding that an earlier call may have set."""
        backend = self.tokenizer.backend_tokenizer
        # Set only where needed: several threads encode at once, and to change a tokenizer in use is an error.
        if backend.truncation is not None:
            backend.no_truncation()
        if backend.padding is not None:
            backend.no_padding()
        return backend


class FittedRow(NamedTuple):
    """The samples of a row, none longer than data.seq_length (unless kept so); none: the row is dropped."""

    parts: Sequence[Encoded]
    dropped_rounds: int = 0
    """Rounds left out because each alone is too long."""


def fit_to_length(
    messages: Sequence[Message], encoded: Encoded, encoder: Encoder, settings: DataSettings
) -> FittedRow:
    """Returns what becomes of a row under data.long_samples."""
    ids_S, trained_S = encoded
    limit = settings.seq_length
    if len(ids_S) <= limit or settings.long_samples == LongSamples.keep:
        return FittedRow([encoded])
    if settings.long_samples == LongSamples.split_turns:
        return _split(messages, encoder, limit)
    kept = {LongSamples.truncate_right: slice(limit), LongSamples.truncate_left: slice(-limit, None)}
    part = kept.get(settings.long_samples)
    return FittedRow([(ids_S[part], trained_S[part])] if part else [])


def _split(messages: Sequence[Message], encoder: Encoder, limit: int) -> FittedRow:
    """Returns the rounds in order, as many to a sample as fit, the system text before each."""
    # The system text is repeated, since it may decide how every round is answered.
    system = [message for message in messages if message.role == "system"]
    rounds: list[list[Message]] = []
    for message in messages[len(system) :]:
        if message.role == "assistant":
            rounds[-1].append(message)
        else:
            rounds.append([message])
    parts: list[Encoded] = []
    left_out = 0
    part_rounds: list[Message] = []
    part: Encoded | None = None
    for turns in rounds:
        # Encoded anew with each round: ids of a conversation are not those of its rounds one after another.
        longer = encoder.encode([*system, *part_rounds, *turns])
        if len(longer[0]) > limit and part is not None:
            parts.append(part)
            part_rounds, part = [], None
            longer = encoder.encode([*system, *turns])
        if len(longer[0]) <= limit:
            part_rounds, part = [*part_rounds, *turns], longer
        else:
            left_out += 1
    return FittedRow([*parts, part] if part is not None else parts, left_out)
