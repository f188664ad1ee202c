"""Fields of rows that a format does not read: found here, counted by the writer, named in the report."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

SAYS_LOSS = ("train", "weight", "loss_mask", "mask", "loss", "loss_scale", "loss_weight")
"""Fields by which rows say what carries loss. Where a format does not read one, a plain number is named as
well."""

LABELS = frozenset(
    (
        *(
            "id",
            "_id",
            "uid",
            "uuid",
            "idx",
            "index",
            "row_id",
            "prompt_id",
            "conversation_id",
            "question_id",
        ),
        *("task_id", "data_name", "dataset", "dataset_name", "source", "category", "subset", "split", "tag"),
        *("tags", "url", "lang", "language", "license", "created", "created_at", "date", "timestamp"),
    )
)
"""Fields that say what a row is, not what it teaches; the report names them last, in a line of their own."""

NOTHING: frozenset[str] = frozenset()


def carries(value: Any) -> bool:
    """Whether a value holds text, a list, an object or bytes; numbers, booleans, null and what is empty do
    not.

    Tables fill absent fields with null at every depth, so an object or a list of nothing else is empty, too.
    """
    return not isinstance(value, bool | int | float) and not _empty(value)


def _empty(value: Any) -> bool:
    if isinstance(value, Mapping):
        return all(map(_empty, value.values()))
    if isinstance(value, list | tuple):
        return all(map(_empty, value))
    return value is None or value == ""


def left_over(fields: Mapping[str, Any], read: Iterable[str], prefix: str = "") -> set[str]:
    """Returns the names of the fields that carry something and are not in `read`, the prefix before each."""
    rest = fields.keys() - read
    return {f"{prefix}{key}" for key in rest if carries(fields[key]) or _says_loss(key, fields[key], prefix)}


def _says_loss(key: str, value: Any, prefix: str) -> bool:
    """Whether the field may take the row out of the loss; of turns that is for the format to read or to
    refuse."""
    return not prefix and key in SAYS_LOSS and value is not None and (key == "mask" or value != 1)


def split_labels(counts: Mapping[str, int]) -> tuple[dict[str, int], dict[str, int]]:
    """Returns the counts of fields that may carry a lesson, and those of labels, each with the most frequent
    first."""
    ordered = dict(sorted(counts.items(), key=lambda item: (-item[1], item[0])))
    return {k: n for k, n in ordered.items() if k not in LABELS}, {
        k: n for k, n in ordered.items() if k in LABELS
    }
