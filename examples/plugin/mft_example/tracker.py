"""A tracker: losses as a table in the run folder."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mft.tracking.base import Tracker


@dataclass
class Table(Tracker):
    """`losses.tsv` in the run folder: a line a logged step; a resumed run cuts off what it trains again."""

    digits: int = 4

    def open(self, run_dir: Path, config: Mapping[str, Any], tags: Mapping[str, str], step: int = 0) -> None:
        self.path = run_dir / "losses.tsv"
        lines = self.path.read_text().splitlines() if self.path.exists() else []
        kept = [line for line in lines if int(line.partition("\t")[0]) <= step]
        self.path.write_text("".join(f"{line}\n" for line in kept))

    def log(self, step: int, values: Mapping[str, float]) -> None:
        if "train/loss" in values:
            with self.path.open("a") as file:
                file.write(f"{step}\t{values['train/loss']:.{self.digits}f}\n")
