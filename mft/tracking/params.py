"""Text that a tracker accepts: a flattened config, names and lengths within its limits, no passwords."""

from __future__ import annotations

import hashlib
import json
import posixpath
import re
from collections.abc import Mapping
from typing import Any

from mft.console.credentials import hidden

KEY_LIMIT = 250  # MLflow refuses longer keys
VALUE_LIMIT = 500  # MLflow servers of every age take this (3.x takes 6,000); config.yaml is uploaded as it is
TAG_LIMIT = 5000  # likewise (3.x takes 8,000)

_REFUSED = re.compile(r"[^\w/.\- :]")


def safe_name(name: str) -> str:
    """Returns a name of a metric, parameter or tag that MLflow accepts; most names stay as they are.

    `@` becomes `_at_` (`pass@1` -> `pass_at_1`). Where another character is replaced, or the name is cut, a
    digest of the name is appended, so that two names never become one.
    """
    clean = _REFUSED.sub("_", name.replace("@", "_at_"))
    if clean.startswith("/") or posixpath.normpath(clean) != clean or clean.split("/")[0] in ("", ".", ".."):
        clean = clean.replace("/", "_").strip(".") or "_"  # names that would leave their folder
    if clean != name.replace("@", "_at_") or len(clean) > KEY_LIMIT:
        digest = hashlib.sha256(name.encode()).hexdigest()[:6]
        half = (KEY_LIMIT - 10) // 2
        clean = (clean if len(clean) <= 2 * half else f"{clean[:half]}..{clean[-half:]}") + f"-{digest}"
    return clean


def cut(text: str, limit: int) -> str:
    """Returns text of at most `limit` characters, the middle left out where it is longer."""
    if len(text) <= limit:
        return text
    half = (limit - 5) // 2
    return f"{text[:half]} ... {text[-half:]}"


def flattened(config: Mapping[str, Any], prefix: str = "") -> dict[str, str]:
    """Returns {dotted key: value}, both as MLflow takes them, credentials hidden.

    true, null, 1e-05, and text as it is; lists and empty mappings as JSON.
    """
    values: dict[str, str] = {}
    for key, value in config.items():
        if isinstance(value, Mapping) and value:
            values |= flattened(value, f"{prefix}{key}.")
        else:
            text = value if isinstance(value, str) else json.dumps(value, default=str, ensure_ascii=False)
            values[safe_name(hidden(f"{prefix}{key}"))] = cut(hidden(text), VALUE_LIMIT)
    return values
