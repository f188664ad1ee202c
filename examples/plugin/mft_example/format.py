"""A data format: rows of a list of frequently asked questions."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from mft.batch import Message
from mft.data.formats import Format, RowError


@dataclass
class Faq(Format):
    """`{"faq": ["question", "answer"]}`."""

    field: str = "faq"

    def fits(self, row: Any) -> bool:
        return isinstance(row, dict) and self.field in row

    def messages(self, row: Any) -> list[Message]:
        pair = row.get(self.field) if isinstance(row, dict) else None
        if not (
            isinstance(pair, list) and len(pair) == 2 and all(isinstance(part, str) and part for part in pair)
        ):
            raise RowError(self.field, "expected a list of a question and its answer")
        return [Message("user", pair[0]), Message("assistant", pair[1])]
