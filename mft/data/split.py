"""Which samples are for training, validation and test: decided by content, so that adding rows never moves old ones."""

from __future__ import annotations

from collections.abc import Sequence

import xxhash

from mft.batch import Message

SPLITS = ("train", "valid", "test")


def digest_of(messages: Sequence[Message]) -> int:
    """Returns a hash of 64 bits over roles and contents: the same for equal conversations, whatever their file, task,
    format or other fields."""
    digest = xxhash.xxh3_64()
    for message in messages:
        digest.update(f"{message.role}\0{message.content}\0".encode())
    return digest.intdigest()


def split_of(digest: int, proportions: Sequence[float]) -> int:
    """Returns the index in SPLITS for a conversation of this digest, so that a duplicate of a training row never
    validates it."""
    point = digest / 2**64 * sum(proportions)
    border = 0.0
    for index, proportion in enumerate(proportions):
        border += proportion
        if point < border:
            return index
    return max(index for index, proportion in enumerate(proportions) if proportion > 0)  # the sum's last rounding
