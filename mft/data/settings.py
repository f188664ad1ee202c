"""The settings under `data`.

The enums derive from str, since values come back from yaml as plain strings, which then stay equal to them.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from enum import Enum
from typing import Any, Optional

from mft.data import template_choice
from mft.errors import UserError, check_ranges, ranged, shortened


class LongSamples(str, Enum):  # noqa: UP042
    """What happens to a sample of more than `seq_length` tokens; the report counts it in every case."""

    drop = "drop"
    truncate_left = "truncate_left"
    truncate_right = "truncate_right"
    split_turns = "split_turns"
    error = "error"
    keep = "keep"  # for rows that cut samples


class BadRows(str, Enum):  # noqa: UP042
    """What happens to a row that cannot be read: it ends the run, or is counted and skipped."""

    error = "error"
    skip = "skip"


class Duplicates(str, Enum):  # noqa: UP042
    """Exact duplicates of another row: keep = they are counted, drop = they are left out, too."""

    keep = "keep"
    drop = "drop"


class PadTo(str, Enum):  # noqa: UP042
    """Width of a padded micro-batch: its longest sample, or always `seq_length`."""

    longest = "longest"
    seq_length = "seq_length"


class Mixture(str, Enum):  # noqa: UP042
    """How often tasks come: each sample once, by `task.<name>.share`, or by size ** (1 / temperature)."""

    natural = "natural"
    shares = "shares"
    temperature = "temperature"


class MixtureBy(str, Enum):  # noqa: UP042
    """What the parts of a mixture are parts of: samples, or tokens that carry loss."""

    samples = "samples"
    tokens = "tokens"


@dataclass
class DataSettings:
    """How rows become samples, and samples the rows of a step; conf/data/base.yaml says how to choose."""

    paths: list[str] = field(default_factory=list)
    """Folders, files or hub datasets, each a task in addition to those of the config group `task`."""
    template: str = "mft"
    """How a conversation is written: mft, mftcoder, tokenizer (its own chat template), or a file *.jinja."""
    role_markers: Any = None
    """Role → marker, in place of the template's own (a typed dict takes no key from the command line)."""
    seq_length: int = ranged(1024, min=2, max=2**31 - 1)
    """Tokens of the longest sample, and of a row under data=pack and data=concat."""
    long_samples: LongSamples = LongSamples.drop
    """What happens to longer samples; all are counted in the report."""
    split: list[float] = field(default_factory=lambda: [95.0, 5.0, 0.0])
    """Proportions of train, valid and test, decided by a hash of each conversation."""
    bad_rows: BadRows = BadRows.error
    """Whether a row that cannot be read ends the run, or is counted."""
    duplicates: Duplicates = Duplicates.keep
    """Whether repeated rows, and training rows that are held out too, are counted or left out."""
    pad_to: PadTo = PadTo.longest
    """Width of a padded micro-batch (data=pad)."""
    length_group: int = ranged(4, min=1)
    """Samples of similar length that follow each other (data=pad with pad_to=longest)."""
    rows: Any = None
    """The row builder: a component, set by data=pack, pad or concat."""
    window: int = ranged(4096, min=1)
    """Samples that are made into rows together; larger windows fill rows better."""
    mixture: Mixture = Mixture.natural
    """How often the samples of each task come."""
    mixture_by: MixtureBy = MixtureBy.samples
    """What the parts of a mixture are parts of."""
    mixture_temperature: float = ranged(2.0, above=0)
    """1: natural parts; larger: nearer to equal ones (mixture=temperature)."""
    limit: Optional[int] = ranged(None, min=1)  # noqa: UP045
    """Only the first so many training samples of each task; null: all."""

    def check(self) -> None:
        """Raises UserError for values that types alone cannot refuse."""
        check_ranges(self, "data")
        if self.role_markers is not None and not isinstance(self.role_markers, dict):
            value, example = shortened(self.role_markers), '{user: "...", assistant: "..."}'
            raise UserError(f"data.role_markers={value} must be a mapping such as {example}, or null")
        template_choice.check(self.template, self.role_markers)
        parts = list(self.split)
        if len(parts) != 3 or any(not math.isfinite(p) or p < 0 for p in parts) or sum(parts) <= 0:
            numbers = "three numbers for train, valid and test, none negative and not all zero"
            raise UserError(f"data.split={shortened(parts)} must be {numbers}, e.g. [95,5,0]")
