"""The settings under `data`: what the data floor reads that is not a component of its own."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from enum import Enum
from typing import Any, Optional

from mft.data import template_choice
from mft.errors import UserError, check_ranges, ranged, shortened


class LongSamples(str, Enum):  # noqa: UP042  (values come back from yaml as plain strings; str keeps them equal)
    """What happens to a sample of more than `seq_length` tokens; in every case it is counted in the report."""

    drop = "drop"
    truncate_left = "truncate_left"
    truncate_right = "truncate_right"
    split_turns = "split_turns"
    error = "error"
    keep = "keep"  # for rows that cut samples


class BadRows(str, Enum):  # noqa: UP042
    """What happens to a row that cannot be understood: stop at it, or count it and go on."""

    error = "error"
    skip = "skip"


class Duplicates(str, Enum):  # noqa: UP042
    """Rows that say the same as another one: keep = they are counted, drop = they are left out, too."""

    keep = "keep"
    drop = "drop"


class PadTo(str, Enum):  # noqa: UP042
    """Width of a padded micro-batch: its longest sample, or always `seq_length`."""

    longest = "longest"
    seq_length = "seq_length"


class Mixture(str, Enum):  # noqa: UP042
    """How often tasks come: each sample once an epoch, by `task.<name>.share`, or by their size to 1 / temperature."""

    natural = "natural"
    shares = "shares"
    temperature = "temperature"


class MixtureBy(str, Enum):  # noqa: UP042
    """What the parts of a mixture are parts of: samples, or tokens that carry loss."""

    samples = "samples"
    tokens = "tokens"


@dataclass
class DataSettings:
    """How rows become samples, and samples the rows of a step. conf/data/base.yaml says how to choose each value."""

    paths: list[str] = field(default_factory=list)
    template: str = "mft"
    role_markers: Any = None  # dict of role -> marker; Any, since a typed dict takes no new key from the command line
    seq_length: int = ranged(1024, min=2, max=2**31 - 1)
    long_samples: LongSamples = LongSamples.drop
    split: list[float] = field(default_factory=lambda: [95.0, 5.0, 0.0])
    bad_rows: BadRows = BadRows.error
    duplicates: Duplicates = Duplicates.keep
    pad_to: PadTo = PadTo.longest
    length_group: int = ranged(4, min=1)
    rows: Any = None
    window: int = ranged(4096, min=1)
    mixture: Mixture = Mixture.natural
    mixture_by: MixtureBy = MixtureBy.samples
    mixture_temperature: float = ranged(2.0, above=0)
    limit: Optional[int] = ranged(None, min=1)  # noqa: UP045

    def check(self) -> None:
        """Raises UserError for values that types alone cannot refuse."""
        check_ranges(self, "data")
        if self.role_markers is not None and not isinstance(self.role_markers, dict):
            raise UserError(
                f"data.role_markers: {shortened(self.role_markers)} must be a mapping such as "
                '{system: "...", user: "...", assistant: "..."}, or null'
            )
        template_choice.check(self.template, self.role_markers)
        parts = list(self.split)
        if len(parts) != 3 or any(not math.isfinite(p) or p < 0 for p in parts) or sum(parts) <= 0:
            raise UserError(
                f"data.split={shortened(parts)} must be three proportions for train, valid and test, none negative and "
                "not all zero, e.g. [95,5,0]"
            )
