"""Runs that are killed for real while they write or remove a folder: what is left counts as whole or as
absent, and the run goes on to the bit."""

from __future__ import annotations

import errno
import multiprocessing
import os
import shutil
import signal
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from mft.distributed.ddp import Ddp, Single
from mft.errors import UserError
from mft.training import checkpoint
from tests.distributed.ranks import run_ranks
from tests.test_run import same, weights
from tests.tiny_runs import SAVING, logged, train

SETTINGS = (*SAVING, "train.keep=1")


def train_and_be_killed(moment: str, tmp_path: Path, cache_dir: Path) -> None:
    """Trains in this process, which gets kill -9 at the moment named."""
    seal, rmtree = checkpoint.seal, shutil.rmtree

    def before(name: str) -> Callable[..., None]:
        return lambda folder, *rest: kill() if folder.name == name else seal(folder, *rest)

    def half_removed(folder: Path, **options: Any) -> None:
        if Path(folder).name.startswith(".step-2.old") and Path(folder).exists():
            (Path(folder) / "adapter_model.safetensors").unlink()
            kill()
        rmtree(folder, **options)

    def kill() -> None:
        os.kill(os.getpid(), signal.SIGKILL)

    if moment == "all files of step 4 but the marker are written":
        checkpoint.seal = before(".step-4.tmp")  # type: ignore[assignment]
    elif moment == "step 2 is being removed":
        shutil.rmtree = half_removed  # type: ignore[assignment]
    else:
        checkpoint.seal = before(".final.tmp")  # type: ignore[assignment]
    train(tmp_path, cache_dir, *SETTINGS)


@pytest.mark.slow
def test_a_run_killed_three_times_while_it_saves_is_the_uninterrupted_one(
    tmp_path: Path, cache_dir: Path
) -> None:
    _, whole = train(tmp_path, cache_dir, *SETTINGS, out="whole")
    run = tmp_path / "run"
    moments = {
        "all files of step 4 but the marker are written": ("step-2", ".step-4.tmp"),
        "step 2 is being removed": ("step-4", ".step-2.old.tmp"),
        "the final model is written": ("step-6", "../.final.tmp"),
    }
    for moment, (newest, left) in moments.items():
        process = multiprocessing.get_context("forkserver").Process(
            target=train_and_be_killed, args=(moment, tmp_path, cache_dir)
        )
        process.start()
        process.join(timeout=300)
        assert process.exitcode == -signal.SIGKILL, moment
        assert checkpoint.newest(run) == run / "checkpoints" / newest, moment
        assert (run / "checkpoints" / left / "adapter_config.json").exists(), moment
        assert not (run / "final").exists()
    summary, _ = train(tmp_path, cache_dir, *SETTINGS)
    assert summary["status"] == "finished"
    assert same(weights(whole / "final"), weights(run / "final"))
    assert logged(run) == logged(whole)
    assert [path.name for path in run.glob("checkpoints/*")] == ["step-6"]
    assert not list(run.glob(".final*"))


def asked_for_room(folder: Path, of_free: list[float]) -> str:
    """Returns what this rank is told that will write so many times what is free."""
    engine = Ddp().start("fp32", cpu=True)
    try:
        own = int(of_free[engine.rank] * shutil.disk_usage(folder).free)
        checkpoint.require_room(folder, "checkpoint", own, engine)
        return ""
    except UserError as error:
        return str(error)
    finally:
        engine.close()


def told_of_a_full_disk(folder: Path) -> str:
    """Returns what this rank is told where rank 1 finds the disk full before rank 0 has written its files."""
    engine = Ddp().start("fp32", cpu=True)
    try:
        with checkpoint.written(folder / "step-1", folder, engine) as temporary:
            if engine.rank == 1:
                raise OSError(errno.ENOSPC, "No space left on device")
            while temporary.exists():
                time.sleep(0.01)
            (temporary / "weights").write_text("")
        return ""
    except UserError as error:
        return str(error)
    finally:
        engine.close()


@pytest.mark.slow
@pytest.mark.dist
def test_ranks_whose_files_another_one_removed_on_a_full_disk_tell_of_the_disk(tmp_path: Path) -> None:
    assert all("The disk is full" in told for told in run_ranks(2, told_of_a_full_disk, tmp_path))


def test_a_file_system_that_does_not_tell_its_size_has_room(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(total=0, used=0, free=0))
    checkpoint.require_room(tmp_path, "checkpoint", 10**9, Single().start("fp32", cpu=True))


@pytest.mark.slow
@pytest.mark.dist
def test_what_all_ranks_write_counts_and_they_agree(tmp_path: Path) -> None:
    for of_free in ([0.7, 0.7], [0.0, 2.0]):
        first, second = run_ranks(2, asked_for_room, tmp_path, of_free)
        assert first == second and "no room for the checkpoint" in first
    assert run_ranks(2, asked_for_room, tmp_path, [0.1, 0.1]) == ["", ""]
