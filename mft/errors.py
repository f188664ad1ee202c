"""Errors a person can act on: the key or file:line, the value, what is allowed, the nearest match."""

from __future__ import annotations

import difflib
import os
import re
from collections.abc import Iterable
from pathlib import Path


class UserError(Exception):
    """A mistake in the input of a run (config, data, paths, machine), told in a sentence the person can act on.

    Entry points print its text alone, without a traceback; everything else that is raised is a defect of ours.
    """


CONTROL = re.compile(
    r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028\u2029\u202a-\u202e\u2066-\u2069]"  # and turned directions
)
"""Characters that a terminal obeys instead of showing them; tab and line feed are not among them."""


def printable(text: str) -> str:
    """Returns text with control characters as Python would write them, so that data cannot steer a terminal."""
    return CONTROL.sub(lambda match: match[0].encode("unicode_escape").decode(), text)


def nearest(value: object, allowed: Iterable[object]) -> str:
    """Returns "; did you mean X?" for the closest allowed value, or "" when none is close."""
    options = [str(option) for option in allowed]
    matches = difflib.get_close_matches(str(value), options, n=1, cutoff=0.6)
    return f"; did you mean {matches[0]}?" if matches else ""


def writable(folder: Path, key: str) -> Path:
    """Returns a folder, made where it is not there; UserError names its config key where nothing can be written."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"{key}: the folder {folder} cannot be made: {error.strerror}.") from error
    if not os.access(folder, os.W_OK | os.X_OK):
        raise UserError(f"{key}: the folder {folder} cannot be written to: permission denied.")
    return folder


def shortened(value: object, limit: int = 80) -> str:
    """Returns repr(value), cut in the middle to at most `limit` characters."""
    text = repr(value)
    if len(text) <= limit:
        return text
    half = (limit - 5) // 2
    return f"{text[:half]} ... {text[-half:]}"
