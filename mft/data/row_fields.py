"""The fields of a parsed row: read with their values checked, or named where no format reads them."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from mft.errors import UserError, nearest, shortened

SKIP_ADVICE = " (data.bad_rows=skip leaves such rows out and counts them)"
"""Added to the error of a bad row where other rows are sound; where none is, skipping would not help."""

LOSS_VALUES = {"train": "true or false", "weight": "0 (no loss) or 1", "loss_mask": "0 (no loss) or 1"}
"""Fields that say whether a turn or a pair carries loss, and are read → their allowed values."""

UNCLEAR_LOSS = ("mask", "loss", "loss_scale", "loss_weight")
"""Fields that say so, too, but mean different things in different programs; they are not read."""

LABEL = re.compile(
    r"_?id|uu?id|idx|index|(row|prompt|conversation|question|task)_id|data_name|dataset(_name)?|source"
    r"|category|subset|split|tags?|url|lang(uage)?|license|created(_at)?|date|timestamp"
)
"""Fields that say what a row is, not what it teaches; the report names them last, on a separate line."""


class RowError(UserError):
    """A row that cannot be understood; its text is `file:line: field: problem`.

    field is "" for the row as a whole; text: the row as it stands in the file, where it could not be parsed.
    Formats know neither file nor line: whoever reads the file adds them with `at`.
    """

    def __init__(self, field: str, problem: str, text: str = "", place: str = ""):
        self.field, self.problem, self.text = field, problem, text
        super().__init__(": ".join(part for part in (place, field, problem) if part))

    def at(self, file: Path, line: int, advice: str = "") -> RowError:
        """Returns the same error with its place, and with advice behind the problem."""
        return RowError(self.field, self.problem + advice, self.text, f"{file}:{line}")


def must_be(field: str, expected: str, value: object) -> RowError:
    """Returns the error for a value of the wrong type or range."""
    return RowError(field, f"must be {expected}, got {shortened(value)}")


def required(fields: object, name: str, place: str = "", noun: str = "row") -> Any:
    """Returns a field of a row, or of an object inside it; raises RowError where it is missing.

    place: path of that object in the row, such as messages[0]; noun: what the error calls it.
    """
    if not isinstance(fields, dict):
        raise must_be(place, f"an object with the field {name}", fields)
    if name not in fields:
        present = shortened(", ".join(list(fields)[:8]) or "none")
        path = f"{place}.{name}" if place else name
        raise RowError(path, f"is missing; the {noun}'s fields: {present}{nearest(name, fields)}")
    return fields[name]


def text_of(value: object, field: str) -> str:
    """Returns a value that must be text; raises RowError, also for text that no tokenizer could encode."""
    if not isinstance(value, str):
        raise must_be(field, "text", value)
    try:
        value.encode()
    except UnicodeEncodeError as error:  # JSON can spell half of a surrogate pair: "\ud800"
        problem = f"holds half of a surrogate pair at character {error.start}, which is not text"
        raise RowError(field, problem) from None
    return value


def optional_text(row: Mapping[str, object], name: str) -> str:
    """Returns a text field, "" where it is absent or null."""
    value = row.get(name)
    return "" if value is None else text_of(value, name)


def carries_loss(fields: Mapping[str, object], names: Iterable[str] = LOSS_VALUES, place: str = "") -> bool:
    """Whether the fields of these names let a turn or a pair carry loss; raises RowError for other values."""
    carries = True
    for name in names:
        value = fields.get(name)
        if value is None:  # tables have a value in every row, so null is as good as absent
            continue
        # true == 1 in Python, but `train` is a boolean, `weight` a number, and `loss_mask` may be either
        right_type = name == "loss_mask" or isinstance(value, bool) == (name == "train")
        if value not in (0, 1) or not right_type:
            raise must_be(f"{place}{name}", LOSS_VALUES[name], value)
        carries = carries and bool(value)
    return carries


def refuse_unclear_loss(turn: Mapping[str, object], place: str) -> None:
    """Raises RowError where an answer would be trained though a field that is not read may say otherwise."""
    for name in UNCLEAR_LOSS:
        if _takes_out(name, turn.get(name)):
            problem = f"{shortened(turn[name])} is not read, so the answer would be trained whatever it says"
            mend = 'write "train": false into turns without loss, and remove this field'
            raise RowError(f"{place}{name}", f"{problem}; {mend}")


def carries(value: object) -> bool:
    """Whether a value holds text, a list, an object or bytes; numbers, null and empty values do not count."""
    return not isinstance(value, bool | int | float) and not _empty(value)


def _empty(value: object) -> bool:
    # Tables fill absent fields with null at every depth: an object or a list of nothing else is empty, too.
    if isinstance(value, Mapping):
        return all(map(_empty, value.values()))
    if isinstance(value, list | tuple):
        return all(map(_empty, value))
    return value is None or value == ""


def left_over(fields: Mapping[str, object], read: Iterable[str], prefix: str = "") -> set[str]:
    """Returns the names of the fields that carry something and are not in `read`, the prefix before each.

    Beside a conversation (prefix "") a plain number counts where its name says what carries loss; in a turn
    `carries_loss` has read it, or `refuse_unclear_loss` refused it.
    """
    rest = set()
    for name in fields.keys() - read:
        value = fields[name]
        if carries(value) or (not prefix and says_loss(name) and _takes_out(name, value)):
            rest.add(f"{prefix}{name}")
    return rest


def says_loss(name: str) -> bool:
    """Whether a field of this name may say what carries loss."""
    return name in LOSS_VALUES or name in UNCLEAR_LOSS


def _takes_out(name: str, value: object) -> bool:
    # a mask of 1 takes out of the loss in some programs and keeps in it in others
    return value is not None and (name == "mask" or value != 1)
