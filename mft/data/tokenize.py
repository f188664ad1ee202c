"""Messages → token ids, the same way for training and for inference, and what becomes of those that are too
long."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import xxhash

from mft.batch import Message
from mft.data.settings import DataSettings, LongSamples
from mft.data.template import Segment, Template
from mft.data.template_choice import of_tokenizer
from mft.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Encoded = tuple[np.ndarray, np.ndarray]
"""ids_S int32, trained_S bool."""


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
        self.tokenizer = tokenizer
        self.template = template
        self.eos_id = int(tokenizer.eos_token_id)
        self.vocab_size = max(
            max(tokenizer.get_vocab().values(), default=0) + 1, len(tokenizer), self.eos_id + 1
        )

    @classmethod
    def saved(cls, tokenizer: PreTrainedTokenizerBase) -> Encoder:
        """Returns the encoder with which the model of a saved tokenizer was trained, found by its chat
        template.

        Raises UserError for a tokenizer without a chat template, or with one that cannot be trained with.
        """
        return cls(tokenizer, of_tokenizer(tokenizer))

    def encode(self, messages: Sequence[Message]) -> Encoded:
        """Returns the training ids of one conversation (ids_S int32) and which of them carry loss (trained_S
        bool)."""
        return self.encode_batch([messages])[0]

    def encode_batch(self, conversations: Iterable[Sequence[Message]]) -> list[Encoded]:
        """Encodes many conversations in one call of the tokenizer. The arrays are views of two flat ones."""
        return self.encode_segments([self.template.segments(messages) for messages in conversations])

    def encode_prompt(self, messages: Sequence[Message]) -> list[int]:
        """Returns the ids after which the model is to answer: a prefix of the training ids of the same
        conversation."""
        return self.encode_segments([self.template.segments(messages, generation=True)])[0][0].tolist()

    def fingerprint(self) -> str:
        """Returns a hash of all that decides the ids: tokenizer, its special tokens, template."""
        if self.tokenizer.is_fast:
            state = self._backend().to_str()
        else:
            state = json.dumps(sorted(self.tokenizer.get_vocab().items()))
        special = json.dumps(self.tokenizer.special_tokens_map, sort_keys=True, default=str)
        parts = [type(self.tokenizer).__name__, state, special, str(self.eos_id), self.template.fingerprint()]
        return xxhash.xxh3_128_hexdigest("\0".join(parts).encode())

    def encode_segments(self, conversations: Sequence[Sequence[Segment]]) -> list[Encoded]:
        """Encodes conversations given in segments, in one call of the tokenizer."""
        segments = [segment for conversation in conversations for segment in conversation]
        flat: list[int] = []
        length_P, trained_P = [], []
        for segment, ids in zip(segments, self._ids([segment.text for segment in segments]), strict=True):
            flat += ids
            if segment.eos:
                flat.append(self.eos_id)
            length_P.append(len(ids) + segment.eos)
            trained_P.append(segment.trained)
        ids_all = np.array(flat, dtype=np.int32)
        trained_all = np.repeat(np.array(trained_P, dtype=bool), length_P)
        border_P = np.concatenate([[0], np.cumsum(length_P, dtype=np.int64)])
        encoded = []
        first_segment = 0
        for conversation in conversations:
            start, stop = border_P[first_segment], border_P[first_segment + len(conversation)]
            encoded.append((ids_all[start:stop], trained_all[start:stop]))
            first_segment += len(conversation)
        return encoded

    def _ids(self, texts: list[str]) -> Iterable[list[int]]:
        if not texts:
            return []
        if self.tokenizer.is_fast:
            return (e.ids for e in self._backend().encode_batch_fast(texts, add_special_tokens=False))
        return self.tokenizer(texts, add_special_tokens=False)["input_ids"]

    def _backend(self):
        """Returns the Rust tokenizer without the truncation or padding that an earlier call may have left in
        it.

        Only asked while several threads encode: to change a tokenizer in use is an error.
        """
        backend = self.tokenizer.backend_tokenizer
        if backend.truncation is not None:
            backend.no_truncation()
        if backend.padding is not None:
            backend.no_padding()
        return backend


class FittedRow(NamedTuple):
    """The samples of a row, none longer than data.seq_length (unless it is to be kept so); none = it is
    dropped.

    dropped_rounds: how many of its rounds were left out, because each alone is too long.
    """

    parts: Sequence[Encoded]
    dropped_rounds: int = 0


def fit_to_length(
    messages: Sequence[Message], encoded: Encoded, encoder: Encoder, settings: DataSettings
) -> FittedRow:
    """Returns what becomes of a row under data.long_samples."""
    ids_S, trained_S = encoded
    limit = settings.seq_length
    if len(ids_S) <= limit or settings.long_samples == LongSamples.keep:
        return FittedRow([encoded])
    if settings.long_samples == LongSamples.truncate_right:
        return FittedRow([(ids_S[:limit], trained_S[:limit])])
    if settings.long_samples == LongSamples.truncate_left:
        return FittedRow([(ids_S[-limit:], trained_S[-limit:])])
    if settings.long_samples == LongSamples.split_turns:
        return _split(messages, encoder, limit)
    return FittedRow([])


def _split(messages: Sequence[Message], encoder: Encoder, limit: int) -> FittedRow:
    """Returns whole rounds in order, as many to a sample as fit, the system text before each."""
    system = [message for message in messages if message.role == "system"]
    rounds: list[list[Message]] = []
    for message in messages[len(system) :]:
        if message.role == "assistant":
            rounds[-1].append(message)
        else:
            rounds.append([message])
    parts: list[Encoded] = []
    left_out = 0
    waiting: list[Message] = []
    last: Encoded | None = None
    for turns in rounds:
        longer = encoder.encode([*system, *waiting, *turns])
        if len(longer[0]) > limit and waiting:
            if last is not None:
                parts.append(last)
            waiting, last = [], None
            longer = encoder.encode([*system, *turns])
        if len(longer[0]) <= limit:
            waiting, last = [*waiting, *turns], longer
        else:
            left_out += 1
    return FittedRow([*parts, last] if last is not None else parts, left_out)
