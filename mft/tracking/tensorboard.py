"""Event files for TensorBoard."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from mft.console.credentials import hidden
from mft.errors import UserError
from mft.tracking.base import Tracker


@dataclass
class TensorBoard(Tracker):
    """Writes metrics as scalars, config and tags as text, into the run's `tensorboard/` or `dir/<run>/`."""

    public_name: ClassVar[str] = "tensorboard"

    dir: str | None = None
    """Folder that gets a folder of event files for each run. None = tensorboard/ in the run folder."""

    def open(self, run_dir: Path, config: Mapping[str, Any], tags: Mapping[str, str], step: int = 0) -> None:
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError as error:
            raise UserError(
                f"tracking.tensorboard: the package is not installed ({error}); "
                'install it with: pip install "mft[tensorboard]", or choose tracking=mlflow or tracking=none'
            ) from error
        self.folder = run_dir / "tensorboard" if self.dir is None else Path(self.dir) / run_dir.resolve().name
        resumed = any(self.folder.glob("events.out.*"))
        # TensorBoard forgets the points of earlier files from purge_step on, so that no step appears twice.
        purge_step = step + 1 if step else 0 if resumed else None
        self.writer = SummaryWriter(str(self.folder), purge_step=purge_step, flush_secs=10)
        for name, value in (("config", config), ("tags", tags)):
            text = hidden(json.dumps(value, indent=2, default=str, ensure_ascii=False))
            indented = "    " + text.replace("\n", "\n    ")  # code in Markdown
            self.writer.add_text(name, indented, step)
        self.writer.flush()

    def log(self, step: int, values: Mapping[str, float]) -> None:
        for name, value in values.items():
            self.writer.add_scalar(name, value, step)

    def close(self, status: str) -> None:
        self.writer.add_text("status", status)
        self.writer.close()

    def where(self) -> str:
        return f"tensorboard --logdir {self.folder}" if hasattr(self, "folder") else ""
