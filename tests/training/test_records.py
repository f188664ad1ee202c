"""metrics.jsonl of a run that was killed and resumed is that of the undisturbed one, row for row."""

from __future__ import annotations

import multiprocessing
import os
import signal
from pathlib import Path
from typing import Any

import pytest

from mft import run_folder
from mft.batch import StepCounts
from mft.tracking.base import Jsonl
from mft.training import loop
from mft.training.trainer import Trainer
from tests.distributed.ranks import run_ranks
from tests.distributed.runs import LAYOUTS, Tree, play
from tests.selection import long
from tests.tiny_runs import logged, train

pytestmark = pytest.mark.slow

SETTINGS = (
    "optimizer.lr=1e-2",
    "train.max_steps=11",
    "train.log_every=3",
    "train.save_every=2",
    "train.eval_every=4",
    "train.eval_samples=4",
    "train.keep=2",
)
LOSSES = {
    "task_token_mean": (),
    "coba": ("loss.warmup_steps=6", "loss.update_interval=2", "loss.probe_samples=1"),
    "famo": (),
    "dwa": ("loss.window=3",),
}
LONG = ("task_token_mean", "coba", "dwa")
"""The other is stopped after its last step."""

MOMENTS = (
    "before the first checkpoint",
    "while validating",
    "between two rows",
    "after a row",
    "asked to stop",
)
"""When the run is ended, one after another: step 1, the validation of step 4, steps 5, 9 and 10."""


class Killed(BaseException):
    """Ends a run in this process where a kill would: nothing of a run catches it."""


def end_at(moment: str, patch: pytest.MonkeyPatch, end: Any) -> None:
    """Has `end` called at that moment of the next run."""
    validate, state, log = Trainer.validate, loop.every, Jsonl.log

    def validating(t: Trainer) -> bool:
        if moment == "while validating" and t.state.step == 4:
            end()
        return validate(t)

    def every(step: int, interval: int | None) -> bool:
        if (moment, step) in (("before the first checkpoint", 1), ("between two rows", 5)):
            end()
        return state(step, interval)

    def logging(self: Jsonl, step: int, values: Any) -> None:
        log(self, step, values)
        if moment == "after a row" and step == 9:
            end()

    patch.setattr(Trainer, "validate", validating)
    patch.setattr(loop, "every", every)
    patch.setattr(Jsonl, "log", logging)


def raised() -> None:
    raise Killed


@pytest.mark.parametrize("loss", [long(loss) if loss in LONG else loss for loss in LOSSES])
def test_a_run_that_is_ended_at_any_moment_leaves_the_rows_of_the_undisturbed_one(
    loss: str, tmp_path: Path, cache_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    given = (f"loss={loss}", *LOSSES[loss], *SETTINGS)
    _, whole = train(tmp_path, cache_dir, *given, out="whole")
    for moment in MOMENTS[:-1]:
        with monkeypatch.context() as patch, pytest.raises(Killed):
            end_at(moment, patch, raised)
            train(tmp_path, cache_dir, *given)
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        # after step 10, or, with famo, after the very last step, whose validation is left to the next start
        patch.setattr(StepCounts, "of", stopping(StepCounts.of, at=2 if loss == "famo" else 1))
        train(tmp_path, cache_dir, *given)
    assert run_folder.status(tmp_path / "run") == "stopped"
    summary, run = train(tmp_path, cache_dir, *given)
    assert summary["status"] == "finished"
    rows = logged(run)
    assert [row["step"] for row in rows] == [0, 3, 4, 6, 8, 9, 11, 11, 11]
    assert rows == logged(whole)
    weighted = [row["step"] for row in rows if any(name.startswith("train/weight/") for name in row)]
    assert weighted == ([] if loss == "task_token_mean" else [3, 6, 9, 11])


def stopping(of: Any, at: int) -> Any:
    """Returns `StepCounts.of` that signals this process in the `at`-th step of the run that resumes from step
    8."""
    seen = []

    def counted(batches: Any, tasks: int, stop: bool) -> Any:
        seen.append(stop)
        if len(seen) == at:
            os.kill(os.getpid(), signal.SIGTERM)
        return of(batches, tasks, stop)

    return counted


def train_and_be_killed(moment: str, tmp_path: Path, cache_dir: Path) -> None:
    end_at(moment, pytest.MonkeyPatch(), lambda: os.kill(os.getpid(), signal.SIGKILL))
    train(tmp_path, cache_dir, "loss=coba", *LOSSES["coba"], *SETTINGS)


@pytest.mark.long
def test_so_does_one_that_is_killed_for_real(tmp_path: Path, cache_dir: Path) -> None:
    given = ("loss=coba", *LOSSES["coba"], *SETTINGS)
    _, whole = train(tmp_path, cache_dir, *given, out="whole")
    for moment in ("before the first checkpoint", "between two rows"):
        process = multiprocessing.get_context("spawn").Process(
            target=train_and_be_killed, args=(moment, tmp_path, cache_dir)
        )
        process.start()
        process.join(timeout=300)
        assert process.exitcode == -signal.SIGKILL
    _, run = train(tmp_path, cache_dir, *given)
    assert logged(run) == logged(whole)


@pytest.mark.dist
def test_the_sums_of_every_rank_are_taken_up(tmp_path: Path) -> None:
    """Saved after step 2, in the middle of the three steps that a row tells of; resumed on two ranks and on
    one."""
    tree = Tree(tmp_path)
    settings = ("train.max_steps=6", "train.log_every=3", "train.save_every=2", *LAYOUTS["pad"])
    settings = ("loss=dwa", "loss.window=2", "train.keep=null", *settings)
    run_ranks(2, play, [tree.frozen("ddp", "whole", settings)])
    start = tree.step("ddp", "whole", 2)
    run_ranks(2, play, [tree.frozen("ddp", "again", settings, start=start)])
    run_ranks(1, play, [tree.frozen("ddp", "fewer", settings, 1, start)])
    whole, again, fewer = (logged(tree.folder("ddp", case)) for case in ("whole", "again", "fewer"))
    assert again == [row for row in whole if row["step"] > 2]
    assert [row.keys() for row in fewer] == [row.keys() for row in again]
    for one, two in zip(again, fewer, strict=True):
        assert two == pytest.approx(one, rel=1e-5)
