"""Our own JSON files: written atomically, and read without trusting what is in them."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mft.files.atomic import write_text


class Values(dict[str, Any]):
    """The object in one of our JSON files, read as what it should hold: a value of another type counts as
    absent."""

    def text(self, key: str) -> str:
        """Returns a text, "" where there is none."""
        value = self.get(key)
        return value if isinstance(value, str) else ""

    def texts(self, key: str) -> list[str]:
        """Returns a list of texts, [] where there is none."""
        value = self.get(key)
        return value if isinstance(value, list) and all(isinstance(item, str) for item in value) else []

    def number(self, key: str) -> float | None:
        """Returns an integer or a finite float, None where there is none."""
        value = self.get(key)
        if isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value):
            return value
        return None

    def part(self, key: str) -> Values:
        """Returns an object, {} where there is none."""
        value = self.get(key)
        return Values(value) if isinstance(value, dict) else Values()


def read_json(path: Path) -> Values:
    """Returns the object in a JSON file, {} when there is no such file, it is broken or holds something
    else."""
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):  # RecursionError: nested too deeply for the parser
        return Values()
    return Values(values) if isinstance(values, dict) else Values()


def write_json(path: Path, values: Mapping[str, object], durable: bool = False) -> None:
    """Writes a JSON file atomically. durable: a power cut leaves the old or the new one, never an empty
    file."""
    write_text(path, json.dumps(values, indent=2, ensure_ascii=False) + "\n", durable)
