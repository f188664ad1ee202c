"""Hashes of file contents, remembered so that unchanged files are not read again at the next start."""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

import xxhash
from filelock import FileLock

from mft.errors import UserError
from mft.files.atomic import write_text
from mft.files.json_file import read_json

YOUNG_SECONDS = 2.0
"""Hashes of files younger than this are not remembered (the rule git uses for its index): one that changes
twice within a tick of the file system's clock keeps its time stamp."""


def file_digests(files: Sequence[Path], cache_dir: Path) -> list[str]:
    """Returns the xxh3-128 of each file's content, in order.

    `<cache_dir>/fingerprints.json` remembers them by absolute path, size, times of change and inode (a copy
    that keeps size and mtime has another ctime); it is replaced atomically under a lock, so several processes
    may share it. Raises UserError for a file that cannot be read.
    """
    memo_path = cache_dir / "fingerprints.json"
    memo = read_json(memo_path)  # empty where it is absent or damaged: the files are then hashed again
    fresh: dict[str, list[int | str]] = {}
    digests = []
    for file in files:
        key = str(file.absolute())
        try:
            stat = file.stat()  # before reading: a change meanwhile is then seen at the next start
            stamp = [stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns, stat.st_ino]
            remembered = memo.get(key)
            if isinstance(remembered, list) and remembered[:-1] == stamp:
                digests.append(str(remembered[-1]))
                continue
            digests.append(_digest(file))
        except OSError as error:
            raise UserError(f"{file}: cannot be read: {error.strerror}") from error
        if time.time() - max(stat.st_mtime, stat.st_ctime) > YOUNG_SECONDS:
            fresh[key] = [*stamp, digests[-1]]
    if fresh:
        # A read-only cache still serves the stores in it; these files are then hashed at every start.
        with suppress(OSError):
            memo_path.parent.mkdir(parents=True, exist_ok=True)
            with FileLock(memo_path.with_suffix(".lock")):
                write_text(memo_path, json.dumps(read_json(memo_path) | fresh))
    return digests


def are_remembered(files: Sequence[Path], cache_dir: Path) -> bool:
    """Whether the hashes of all files were made before, of whatever content they then had."""
    memo = read_json(cache_dir / "fingerprints.json")
    return all(str(file.absolute()) in memo for file in files)


def _digest(file: Path) -> str:
    with file.open("rb") as content:
        return hashlib.file_digest(content, xxhash.xxh3_128).hexdigest()
