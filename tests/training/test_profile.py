"""train.profile: which steps are recorded, what is written, and that nothing else changes."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import pytest
import torch

from mft.training import profile
from mft.training.phases import Phase, Phases
from mft.training.profile import MICRO_BATCHES, SKIPPED, STEPS, StepProfile, window
from tests.tiny_runs import logged, train


@pytest.mark.parametrize(
    ("done", "total", "accumulation", "intervals", "expected"),
    [
        (0, 100, 1, [], [6, 7, 8]),
        (40, 100, 1, [None, None], [46, 47, 48]),
        (0, 100, 2, [], [6, 7]),
        (0, 100, 3, [], [6]),
        (0, 100, 64, [], [6]),
        (0, 7, 1, [], [6, 7]),
        (0, 5, 1, [], []),
        (40, 45, 1, [], []),
        (0, 100, 1, [7], [8, 9, 10]),
        (0, 100, 1, [4, 6], [9, 10, 11]),
        (0, 100, 1, [2, 100], [7, 8]),
        (0, 10**9, 1, [1], [6]),
    ],
)
def test_few_steps_are_recorded_after_the_first_and_apart_from_validations(
    done: int, total: int, accumulation: int, intervals: list[int | None], expected: list[int]
) -> None:
    assert list(window(done, total, accumulation, intervals)) == expected
    assert len(expected) <= STEPS and len(expected) * min(accumulation, MICRO_BATCHES) <= MICRO_BATCHES


def test_a_run_that_is_too_short_is_told_so(tmp_path: Path) -> None:
    asked = StepProfile(tmp_path)
    assert f"the run has 4 steps, and the first {SKIPPED}" in asked.choose(0, 4)
    assert "3 steps are left" in asked.choose(40, 43)
    assert not StepProfile().choose(0, 4), "nobody asked"
    assert not asked.result and not list(tmp_path.iterdir())


def events(path: Path) -> list[str]:
    with gzip.open(path, "rt", encoding="utf-8") as file:
        return [event.get("name", "") for event in json.load(file)["traceEvents"]]


SETTINGS = ("train.max_steps=9", "train.save_every=3", "train.eval_every=null", "peft.dropout=0.1")


@pytest.mark.slow
def test_the_trace_has_the_operations_of_the_steps_and_the_run_is_the_same(
    tmp_path: Path, cache_dir: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    _, plain = train(tmp_path, cache_dir, *SETTINGS, out="plain")
    assert "profile" not in capsys.readouterr().out and not (plain / profile.FOLDER).exists()
    _, run = train(tmp_path, cache_dir, *SETTINGS, "train.profile=true", out="profiled")
    assert logged(run) == logged(plain)
    weights = "final/adapter_model.safetensors"
    assert (run / weights).read_bytes() == (plain / weights).read_bytes()

    said = " ".join(capsys.readouterr().out.split())
    trace, table = (run / profile.FOLDER / f"steps-7-9{suffix}" for suffix in (".trace.json.gz", ".txt"))
    assert trace.name in said and "ui.perfetto.dev" in said
    names = events(trace)
    steps = {name for name in names if name.startswith("ProfilerStep")}
    assert len(steps) == 3 and "aten::mm" in names and any("AdamW" in name for name in names)
    text = table.read_text()
    assert "aten::mm" in text and "perfetto" in text and text.index("Self CPU") > 0
    assert trace.stat().st_size < 10 << 20


@pytest.mark.slow
def test_of_a_long_step_the_last_micro_batches_are_recorded(tmp_path: Path, cache_dir: Path) -> None:
    long = ["train.max_steps=6", f"train.gradient_accumulation_steps={MICRO_BATCHES + 2}", "train.epochs=30"]
    _, run = train(tmp_path, cache_dir, *SETTINGS, *long, "train.profile=true")
    names = events(run / profile.FOLDER / "steps-6-6.trace.json.gz")
    assert len({name for name in names if name.startswith("ProfilerStep")}) == MICRO_BATCHES
    assert any("AdamW" in name for name in names), "the update is the end of the step"


@pytest.mark.slow
def test_a_profile_that_cannot_be_written_ends_no_run(
    tmp_path: Path, cache_dir: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(profile, "FOLDER", "config.yaml/profile")  # a file is no folder
    summary, _ = train(tmp_path, cache_dir, *SETTINGS, "train.profile=true")
    assert summary["status"] == "finished" and "not written: " in capsys.readouterr().out


def test_of_a_profile_that_fills_the_disk_nothing_stays(tmp_path: Path) -> None:
    """Its table goes to a device that is always full."""
    (tmp_path / profile.FOLDER).mkdir()
    (tmp_path / profile.FOLDER / "steps-6-6.txt").symlink_to("/dev/full")
    watched = StepProfile(tmp_path)
    assert not watched.choose(0, SKIPPED + 1)
    for step in range(1, SKIPPED + 2):
        watched.before(step, 1)
        watched.after(step)
    assert "No space left on device" in dict(watched.result)["profile"]
    assert not list((tmp_path / profile.FOLDER).iterdir())


def test_a_run_that_ends_early_leaves_no_profiler_behind(tmp_path: Path) -> None:
    watched = StepProfile(tmp_path)
    assert not watched.choose(0, 100)
    for step in range(1, SKIPPED + 3):
        watched.before(step, 1)
        watched.after(step)
    assert torch.autograd._profiler_enabled()
    watched.close()
    assert not torch.autograd._profiler_enabled()
    assert watched.result == [("profile", f"none: the run ended before step {SKIPPED + STEPS}")]


def test_other_ranks_wait_for_the_one_that_writes_in_no_step(tmp_path: Path) -> None:
    phases, met = Phases(Phase.training), []
    other = StepProfile(tmp_path, phases, records=False, barrier=lambda: met.append(phases.phase))
    assert not other.choose(0, SKIPPED + 1)
    for step in range(1, SKIPPED + 2):
        other.before(step, 1)
        assert not torch.autograd._profiler_enabled()
        other.after(step)
    assert met == [Phase.saving] and phases.phase is Phase.training and not list(tmp_path.iterdir())


@pytest.mark.long
@pytest.mark.parametrize("backend", ["ddp", "zero2", "zero3", "fsdp"])
def test_rank_0_records_on_every_backend(tmp_path: Path, cache_dir: Path, backend: str) -> None:
    several = ["launch=processes", "launch.nproc=2", f"dist={backend}", "train.profile=true"]
    summary, run = train(tmp_path, cache_dir, *SETTINGS, *several)
    assert summary["status"] == "finished"
    assert [path.name for path in (run / profile.FOLDER).glob("*.gz")] == ["steps-7-9.trace.json.gz"]
