"""Which samples are for training, validation and test.

Content decides, so that adding rows never moves old ones; or the name of a file or folder, as hub data sets
are laid out: test-00000-of-00002.jsonl.
"""

from __future__ import annotations

import re
from bisect import bisect
from collections.abc import Sequence
from itertools import accumulate
from pathlib import PurePath

import xxhash

from mft.batch import Message
from mft.errors import UserError

SPLITS = ("train", "valid", "test")


def digest_of(messages: Sequence[Message]) -> int:
    """Returns a 64-bit hash of roles and contents, the same in whatever file, task or format they stand."""
    digest = xxhash.xxh3_64()
    for message in messages:
        digest.update(f"{message.role}\0{message.content}\0".encode())
    return digest.intdigest()


def split_of(digest: int, proportions: Sequence[float]) -> int:
    """Returns the index in SPLITS for a conversation of this digest.

    Equal conversations get the same one, so that a duplicate of a training row never validates it.
    """
    index = bisect(list(accumulate(proportions)), digest / 2**64 * sum(proportions))
    # rounding may leave the last border a little below the largest point
    return min(index, max(i for i, proportion in enumerate(proportions) if proportion > 0))


KEYWORDS = {
    **dict.fromkeys(("train", "training"), ""),
    **dict.fromkeys(("validation", "valid", "val", "dev"), "valid"),
    **dict.fromkeys(("test", "testing", "eval", "evaluation"), "test"),
}
"""Words in the name of a file or folder → the split it is for, "" = the one that trains."""

WORD = re.compile(r"[^-._ 0-9]+")  # what the hub's convention takes for the borders of a word


def split_named(path: PurePath) -> str:
    """Returns the split that a path inside a task's folder names: valid, test, or "" for train and where it
    names none.

    The name of the file decides, then that of the nearest folder that names one. Raises UserError for a name
    that names several, since such rows must not be trained by chance.
    """
    for part in reversed(path.parts):
        splits = {KEYWORDS[word] for word in WORD.findall(part.lower()) if word in KEYWORDS}
        if len(splits) > 1:
            raise UserError(f"{path}: {part!r} names several splits; rename it, or give the files one by one")
        if splits:
            return splits.pop()
    return ""
