"""Run folders as a finished run leaves them, written without a training."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from mft.config.identity import Identity
from mft.errors import UserError
from mft.files.json_file import write_json
from mft.tracking.record import Record
from mft.tracking.sender import sync

CONFIG = {
    "name": "small",
    "choices": {"model": "tiny", "peft": "lora", "loss": "coba"},
    "optimizer": {"lr": 0.002},
}


def losses_at(step: int, tasks: Sequence[str], prefix: str = "valid") -> dict[str, float]:
    """Returns the row of a validation: task number i has the loss i + 1 / step."""
    values = {f"{prefix}/loss/{task}": number + 1 / step for number, task in enumerate(tasks)}
    return {f"{prefix}/loss": sum(values.values()) / len(values)} | values


def write_run(
    folder: Path,
    store: str,
    tasks: Sequence[str] = ("docs", "code"),
    steps: Sequence[int] = (2, 4, 6),
    tested: int = 4,
    tags: Mapping[str, str] | None = None,
    **record: Any,
) -> Path:
    """Writes a finished run with a validation and a checkpoint at each of `steps`, and a test of one; `sync`
    sends it to the store."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.yaml").write_text(yaml.safe_dump(CONFIG, sort_keys=False))
    last, test = max(steps), losses_at(tested, tasks, "test")
    best = {f"best/{name}": value for name, value in losses_at(last, tasks).items()}
    rows = [{"step": step, "train/loss": 1 / step} | losses_at(step, tasks) for step in steps]
    rows.append({"step": last, "best/step": last, "test/step": tested, "total/seconds": 3.0} | best | test)
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    for step in steps:
        write_checkpoint(folder, step)
    (folder / "final").mkdir(exist_ok=True)
    (folder / "final" / "config.json").write_text("{}")
    first, ended = losses_at(min(steps), tasks), losses_at(last, tasks)
    summary = {"status": "finished", "steps": last, "total_steps": last, "seconds": 3.0, "first": first}
    write_json(
        folder / "summary.json",
        summary | {"last": ended, "best": ended | {"step": last}, "test": {"step": tested} | test},
    )
    sizes = {"samples": 50, "rows": 40, "tokens": 900, "trained_tokens": 400}
    account = {"rows": 44, "kept": 44, "samples": 54, "tokens": 990, "trained_tokens": 440}
    account |= {"sizes": {"train": sizes, "valid": dict.fromkeys(sizes, 4), "test": dict.fromkeys(sizes, 0)}}
    write_json(
        folder / "report" / "data.json", {task: account | {"paths": [f"/data/{task}"]} for task in tasks}
    )
    fingerprints = {f"task.{task}": f"{number:040x}" for number, task in enumerate(tasks, 0xABCDEF << 136)}
    write_json(folder / "identity.json", Identity("a", "b", tuple(tasks), {}, {}, fingerprints).as_json())
    write_json(folder / "overrides.json", {"overrides": ["loss=coba", "optimizer.lr=0.002"]})
    given = {"outcome": "finished", "started": 1_700_000_000_000, "uri": store, "tags": dict(tags or {})}
    Record(**(given | record)).save(folder)
    return folder


def sent(run_dir: Path, uri: str = "") -> int:
    """Sends a run, once the tracker that was closed has let it go; returns how much was left.

    `close` leaves to `sync` what takes a busy machine longer than its patience.
    """
    deadline = time.monotonic() + 120
    while True:
        try:
            return sync(run_dir, uri)[0]
        except UserError as error:
            if "another process" not in str(error) or time.monotonic() > deadline:
                raise
            time.sleep(0.2)


def write_checkpoint(folder: Path, step: int) -> None:
    """Writes a complete checkpoint."""
    kept = folder / "checkpoints" / f"step-{step}"
    kept.mkdir(parents=True, exist_ok=True)
    (kept / "COMPLETE").write_text("")
