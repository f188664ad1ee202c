"""Which samples are for training, validation and test: decided by content, so that adding rows never moves old ones."""

from __future__ import annotations

from collections.abc import Sequence

import xxhash

from mft.batch import Message

SPLITS = ("train", "valid", "test")


def split_of(messages: Sequence[Message], proportions: Sequence[float]) -> int:
    """Returns the index in SPLITS for a conversation.

    The hash is over roles and contents only: equal conversations land in the same split whatever their file, task,
    format or other fields, so a duplicate of a training row never validates it.
    """
    digest = xxhash.xxh3_64()
    for message in messages:
        digest.update(f"{message.role}\0{message.content}\0".encode())
    point = digest.intdigest() / 2**64 * sum(proportions)
    border = 0.0
    for index, proportion in enumerate(proportions):
        border += proportion
        if point < border:
            return index
    return max(index for index, proportion in enumerate(proportions) if proportion > 0)  # the sum's last rounding
