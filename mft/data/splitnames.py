"""Which split a file is for by its name, as data sets of the hub are laid out: test-00000-of-00002.jsonl."""

from __future__ import annotations

import re
from pathlib import PurePath

from mft.errors import UserError

KEYWORDS = {
    **dict.fromkeys(("train", "training"), ""),
    **dict.fromkeys(("validation", "valid", "val", "dev"), "valid"),
    **dict.fromkeys(("test", "testing", "eval", "evaluation"), "test"),
}
"""Words in the name of a file or folder → the split it is for, "" = the one that trains."""

WORD = re.compile(r"[^-._ 0-9]+")  # what the hub's convention takes for the borders of a word


def split_named(path: PurePath) -> str:
    """Returns the split that a path inside a task's folder names: valid, test, or "" for train and where it names none.

    The name of the file decides, then that of the nearest folder that names one. Raises UserError for a name that names
    several, since such rows must not be trained by chance.
    """
    for part in reversed(path.parts):
        splits = {KEYWORDS[word] for word in WORD.findall(part.lower()) if word in KEYWORDS}
        if len(splits) > 1:
            raise UserError(f"{path}: {part!r} names several splits; rename it, or give the files one by one")
        if splits:
            return splits.pop()
    return ""
