"""What a run writes when it ends: summary.json, the plots of report/, and the tables in the terminal."""

from __future__ import annotations

import math
import os
import shlex
from itertools import zip_longest
from pathlib import Path
from typing import Any

from mft import run_folder
from mft.console.credentials import hidden
from mft.files.json_file import Values, write_json
from mft.objective import mean_of_tasks
from mft.tracking.base import TOTAL
from mft.training import costs, plots
from mft.training.final_test import Tested
from mft.training.panels import cannot_draw
from mft.training.progress import losses_table
from mft.training.trainer import Trainer


def summarise(t: Trainer, status: str, run_dir: Path, tested: Tested) -> dict[str, Any]:
    """Returns the content of summary.json. All ranks call it."""
    t.count_time()
    # the named steps may have been pruned since: a path is given only if it is there
    best, checkpoints = t.state.best, run_dir / "checkpoints"
    rows, _ = run_folder.metric_rows(run_dir / "metrics.jsonl")
    logged = [row["train/loss"] for row in rows if "train/loss" in row]
    by_task = {}
    for name, loss in best.task_loss.items():
        checkpoint = _existing(checkpoints / f"step-{best.task_saved_step.get(name)}")
        by_task[name] = {"valid/loss": loss, "step": best.task_step[name], "checkpoint": checkpoint}
    judged = {"step": best.step, "by": t.settings.best, "value": best.value} if best.losses else {}
    return {
        "status": status,
        "steps": t.state.step,
        "total_steps": t.total_steps,
        "epochs": round(t.state.epochs_done, 4),
        "seconds": round(t.state.seconds, 1),
        "ranks": t.engine.world,
        "tokens": t.state.tokens,
        "all_tokens": None if t.state.unmeasured[0] else t.state.positions,
        "trained_tokens": None if t.state.unmeasured[0] else t.state.trained,
        "flops": t.state.tokens * t.meter.work.model,
        **costs.of_run(t),
        "first": _losses(best.first),
        "last": _losses(best.last),
        "best": _losses(best.losses) | judged,
        "test": {"step": tested.step} | _losses(tested.losses, "test") if tested.losses else {},
        "best_by_task": {name: by_task[name] for name in t.names if name in by_task},
        "skipped_steps": t.state.skipped,
        "train/loss": logged[-1] if logged else None,
        "best_checkpoint": _existing(checkpoints / f"step-{best.saved_step}"),
        "final": _existing(run_dir / "final"),
    }


def last_row(summary: dict[str, Any]) -> dict[str, float]:
    """Returns what is logged once, when a run has finished: its best validation, its test and its cost."""
    row = {f"best/{name}": value for name, value in summary["best"].items() if name not in ("by", "value")}
    row |= {"test/step" if name == "step" else name: value for name, value in summary["test"].items()}
    totals = ("tokens", "all_tokens", "trained_tokens", "flops", "seconds")
    row |= {f"{TOTAL}{name}": summary[name] for name in totals} | costs.metrics(summary)
    return {name: math.nan if value is None else value for name, value in row.items()}


def draw(run_dir: Path) -> str:
    """Draws the pictures of report/; returns why there are none, "" where they are."""
    if not (why := cannot_draw()):
        rows = run_folder.metric_rows(run_dir / "metrics.jsonl")[0]
        plots.loss_curves(rows, run_dir / "report")
        plots.task_weights(rows, run_dir / "report")
    return why


def failed(run_dir: Path, error: BaseException, steps: int) -> None:
    """Writes the summary of a run that ended in an error after `steps` steps."""
    values = {"status": "failed", "steps": steps, "error": hidden(f"{type(error).__name__}: {error}")}
    write_json(run_dir / "summary.json", values)


def show(summary: dict[str, Any], t: Trainer, run_dir: Path, tested: Tested) -> None:
    """Prints the losses of every task, what the run took, where the model is, how to load it and how to look
    at the tracker."""
    state, progress = t.state, t.progress
    if state.best.last or tested.losses:
        best = state.best
        progress.show(losses_table(best.first, best.last, best.losses, best.step, tested.losses, tested.step))
    for cost in costs.tables(Values(summary)):
        progress.show(cost)
    folder = _shown(run_dir)
    rows = [("run folder", folder)]
    if summary["final"]:
        prompt = "Write a function that reverses a list."
        rows.append(("model", f"{folder}/final"))
        rows.append(("ask it", f'mft generate {shlex.quote(folder)} "{prompt}"'))
        if (run_dir / "final" / "adapter_config.json").exists():
            rows.append(("merge it", f"mft merge {shlex.quote(folder)}"))
    if summary["best_checkpoint"]:
        rows.append(("best checkpoint", _shown(Path(summary["best_checkpoint"]))))
    rows += t.profile.result
    if summary["status"] == "stopped":
        rows.append(("resume", "the same command again (train.resume=auto)"))
    if where := t.tracker.where():
        rows += [(name, line) for name, line in zip_longest(["tracker"], where.splitlines(), fillvalue="")]
    rows.append(("took", f"{summary['seconds']:.0f} s, {summary['peak_memory_gib']:.1f} GiB at most"))
    progress.show_pasted(rows, f"{summary['status']} after {summary['steps']} steps")


def _losses(by_task: dict[str, float], split: str = "valid") -> dict[str, float | None]:
    """Returns the losses by the names they have in metrics.jsonl; null where one is not finite, as there."""
    if not by_task:
        return {}
    named = {f"{split}/loss": mean_of_tasks(by_task)}
    named |= {f"{split}/loss/{name}": loss for name, loss in by_task.items()}
    return {name: value if math.isfinite(value) else None for name, value in named.items()}


def _existing(path: Path) -> str | None:
    return str(path) if path.is_dir() else None


def _shown(path: Path) -> str:
    return os.path.relpath(path) if path.is_relative_to(Path.cwd()) else str(path)
