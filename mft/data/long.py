"""What becomes of a sample of more than `seq_length` tokens."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from mft.batch import Message
from mft.data.settings import DataSettings, LongSamples

if TYPE_CHECKING:
    from mft.data.tokenize import Encoder

Encoded = tuple[np.ndarray, np.ndarray]
"""ids_S int32, trained_S bool."""


class Fitted(NamedTuple):
    """The samples of a row, none longer than data.seq_length (unless it is to be kept so); none = it is dropped.

    rounds: how many of it were left out, because each alone is too long.
    """

    parts: Sequence[Encoded]
    rounds: int = 0


def fitted(messages: Sequence[Message], encoded: Encoded, encoder: Encoder, settings: DataSettings) -> Fitted:
    """Returns what becomes of a row under data.long_samples."""
    ids_S, trained_S = encoded
    limit = settings.seq_length
    if len(ids_S) <= limit or settings.long_samples == LongSamples.keep:
        return Fitted([encoded])
    if settings.long_samples == LongSamples.truncate_right:
        return Fitted([(ids_S[:limit], trained_S[:limit])])
    if settings.long_samples == LongSamples.truncate_left:
        return Fitted([(ids_S[-limit:], trained_S[-limit:])])
    if settings.long_samples == LongSamples.split_turns:
        return _split(messages, encoder, limit)
    return Fitted([])


def _split(messages: Sequence[Message], encoder: Encoder, limit: int) -> Fitted:
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
    return Fitted([*parts, last] if last is not None else parts, left_out)
