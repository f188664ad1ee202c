"""Errors a person can act on: the key or file:line, the value, what is allowed, the nearest match.

The range of a number is declared with its field: its metadata holds `min`, `max` (inclusive), `above`,
`below` (exclusive). Without any, a number must be finite and fit into 64 bits, since no setting means
anything beyond.
"""

from __future__ import annotations

import dataclasses
import difflib
import errno
import math
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any


class UserError(Exception):
    """Invalid user input (config, data, paths, hardware). The message says how to fix it.

    Entry points print its text alone, without a traceback; everything else that is raised is a bug.
    exit_code: 2 for a mistake in what was asked; the launcher makes it 1 where a run had started and failed.
    """

    exit_code = 2


# C0 and C1, line and paragraph separators, and the marks that reverse the direction of text
CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028\u2029\u202a-\u202e\u2066-\u2069]")
"""Characters that a terminal obeys instead of showing them; tab and line feed are not among them."""


def printable(text: str) -> str:
    """Returns text with control characters as Python would write them, so that data cannot steer a
    terminal."""
    return CONTROL.sub(lambda match: match[0].encode("unicode_escape").decode(), text)


def nearest(value: object, allowed: Iterable[object]) -> str:
    """Returns "; did you mean X?" for the closest allowed value, or "" when none is close."""
    found = _closest(value, allowed)
    return f"; did you mean {found}?" if found else ""


def _closest(value: object, allowed: Iterable[object]) -> str:
    options = {str(option).lower(): str(option) for option in allowed}
    matches = difflib.get_close_matches(str(value).lower(), options, n=1, cutoff=0.6)
    return options[matches[0]] if matches else ""


def writable(folder: Path, key: str) -> Path:
    """Returns a folder, made where it is not there; UserError names its config key where nothing can be
    written."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"{key}: the folder {folder} cannot be made: {error.strerror}.") from error
    if not os.access(folder, os.W_OK | os.X_OK):
        raise UserError(f"{key}: the folder {folder} cannot be written to: permission denied.")
    return folder


def is_full_disk(error: BaseException) -> bool:
    """Whether an error, or what caused it, says that a disk is full or that its quota is used up."""
    return _says(error, (errno.ENOSPC, errno.EDQUOT), ("No space left",))


def _says(error: BaseException, codes: Sequence[int], texts: Sequence[str]) -> bool:
    """Whether an error, or what caused it, has one of these numbers of the system, or names it in its
    text."""
    link: BaseException | None = error
    seen: set[int] = set()  # a chain may be closed: `raise error from error`
    while link is not None and id(link) not in seen:
        if getattr(link, "errno", None) in codes or any(text in str(link) for text in texts):
            return True
        seen.add(id(link))
        link = link.__cause__ or link.__context__
    return False


def full_disk(error: BaseException, folder: Path | None = None) -> UserError | None:
    """Returns the sentence for a disk that is full, None for any other error and where it was reported
    already."""
    if isinstance(error, UserError) or not is_full_disk(error):
        return None
    file = getattr(error, "filename", None) or (f"a file in {folder}" if folder else "a file")
    refusal = UserError(f"The disk is full: {file} cannot be written. Make room; the same command resumes.")
    refusal.exit_code = 1
    return refusal


LIMITS = (
    (
        (errno.EMFILE, errno.ENFILE),
        ("Too many open files", "Failed to init uv loop"),  # the second is torch's, of a TCPStore
        "Allow more open files (ulimit -n)",
    ),
    ((errno.EFBIG,), ("File too large",), "Allow longer files (ulimit -f)"),
    (
        (errno.EACCES, errno.EPERM, errno.EROFS),
        ("Permission denied", "Read-only file system"),
        "Make it writable for this user",
    ),
)
"""What else the system may refuse: its numbers, how libraries write it without one, and what to do."""


def refused_by_system(error: BaseException, folder: Path | None = None) -> UserError | None:
    """Returns the sentence for a full disk, a limit or a missing permission, None for any other error.

    folder: what was being written, should the error not name the file.
    """
    if isinstance(error, UserError):
        return None
    if refusal := full_disk(error, folder):
        return refusal
    for codes, texts, mend in LIMITS:
        if _says(error, codes, texts):
            file = getattr(error, "filename", None) or (f"a file in {folder}" if folder else "a file")
            refusal = UserError(f"{file}: {texts[0].lower()} ({error}). {mend}; the same command resumes.")
            refusal.exit_code = 1
            return refusal
    return None


def no_path(error: BaseException) -> UserError | None:
    """Returns the sentence for a path that no file system accepts, None for any other error."""
    # What the system says of paths that lead nowhere, on any machine.
    if not isinstance(error, OSError) or error.errno not in (errno.ENAMETOOLONG, errno.ELOOP):
        return None
    return UserError(f"{shortened(str(error.filename or ''))[1:-1] or 'a path'}: {error.strerror}.")


def shortened(value: object, limit: int = 80) -> str:
    """Returns a value as JSON and yaml have null, true and false, else repr(value), cut in the middle to at
    most `limit` characters."""
    text = "null" if value is None else str(value).lower() if isinstance(value, bool) else repr(value)
    if len(text) <= limit:
        return text
    half = (limit - 5) // 2
    return f"{text[:half]} ... {text[-half:]}"


LARGEST = 2**63 - 1
"""Largest integer: counters, seeds and offsets have 64 bits."""

BOUNDS = {
    "min": ("at least", lambda value, bound: value >= bound),
    "above": ("greater than", lambda value, bound: value > bound),
    "max": ("at most", lambda value, bound: value <= bound),
    "below": ("less than", lambda value, bound: value < bound),
}
"""Name in the metadata → how it reads, and the comparison; in the order in which a sentence names them."""


def ranged(default: Any, **bounds: float) -> Any:
    """Returns a dataclass field with this default and range, e.g. `rank: int = ranged(16, min=1)`."""
    return dataclasses.field(default=default, metadata=bounds)


def check_ranges(settings: Any, path: str) -> None:
    """Raises UserError for the first number of a dataclass outside its range; path: where it stands in the
    config."""
    for field in dataclasses.fields(settings):
        value = getattr(settings, field.name)
        is_number = isinstance(value, int | float) and not isinstance(value, bool)
        if is_number and not _within(value, field.metadata):
            null = ", or null" if "None" in str(field.type) or "Optional" in str(field.type) else ""
            described = _described(value, field.metadata)
            raise UserError(f"{path}.{field.name}={shortened(value, 40)} must be {described}{null}.")


def _within(value: float, bounds: Mapping[str, float]) -> bool:
    if isinstance(value, int) and abs(value) > LARGEST:  # first, since a float does not hold all integers
        return False
    return math.isfinite(value) and all(BOUNDS[name][1](value, bound) for name, bound in bounds.items())


def _described(value: float, bounds: Mapping[str, float]) -> str:
    """Returns "at least 0 and less than 1"; of a number that nothing takes also that it must be finite, or
    smaller."""
    if isinstance(value, int) and value > LARGEST and not {"max", "below"} & set(bounds):
        bounds = {**bounds, "max": LARGEST}
    phrases = [f"{words} {bounds[name]}" for name, (words, _) in BOUNDS.items() if name in bounds]
    if isinstance(value, float) and not math.isfinite(value):
        phrases.append("finite")
    return " and ".join(phrases) or f"between -{LARGEST} and {LARGEST}"


def check_choice(key: str, value: object, allowed: Iterable[object]) -> None:
    """Raises UserError unless a value is one of those allowed, as they are written in yaml (None is null)."""
    names = ["null" if option is None else str(option) for option in allowed]
    text = "null" if value is None else str(value)
    if text not in names:
        hint = nearest(text, names) or "."
        raise UserError(f"{key}={shortened(value)} is not one of {', '.join(names)}{hint}")


def nearest_sibling(path: Path) -> str:
    """Returns "; did you mean X?" for what lies beside a path that does not exist, or ""."""
    # Names alone are compared: the paths of one folder are alike for the most part.
    name = _closest(path.name, (other.name for other in path.parent.glob("*") if other.name != path.name))
    return f"; did you mean {path.parent / name}?" if name else ""
