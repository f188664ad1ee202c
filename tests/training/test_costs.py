"""What a run took, as its summary, its last row and its tables tell it."""

from __future__ import annotations

import io
from types import SimpleNamespace
from typing import Any

import pytest
from rich.console import Console

from mft import run
from mft.files.json_file import Values
from mft.training import costs
from mft.training.speed import Peak, Work
from mft.training.state import State
from tests.tiny_runs import logged, stopped_after, train

GIB = 2**30


def rank(training: float, waited: float, peaks: list[int], resets: bool = True) -> dict[str, Any]:
    return {
        "seconds": {"loading": 2.0, "training": training},
        "peaks": {"training": peaks, "loading": [GIB] * len(peaks)},
        "resets": resets,
        "waited": waited,
        "device_seconds": 2 * training,
    }


def summary_of(ranks: list[dict[str, Any]], peak: Peak, **values: Any) -> dict[str, Any]:
    state = State(step=10, tokens=8000, positions=10_000, trained=4000, costs=ranks, **values)
    trainer: Any = SimpleNamespace(state=state, meter=SimpleNamespace(work=Work(6e9, 2e9, peak)))
    return {"ranks": len(ranks)} | costs.of_run(trainer)


def shown(summary: dict[str, Any], width: int = 80) -> str:
    console = Console(file=io.StringIO(), width=width)
    for table in costs.tables(Values(summary)):
        console.print(table)
    text = console.file.getvalue()  # type: ignore[attr-defined]
    assert max(map(len, text.splitlines()), default=0) <= width and "…" not in text
    return text


def test_the_slowest_and_the_largest_rank_are_named() -> None:
    ranks = [rank(20.0, 0.1, [3 * GIB, 5 * GIB]), rank(19.0, 0.2, [4 * GIB, 6 * GIB])]
    summary = summary_of(ranks, Peak(1.0, "train.peak_tflops"))
    training = summary["phases"]["training"]
    assert training == {
        "seconds": 20.0,
        "slowest_rank": 0,
        "peak_gib": 4.0,
        "reserved_gib": 6.0,
        "largest_rank": 1,
    }
    speed = summary["speed"]
    assert summary["peak_memory_gib"] == 4 and speed["tokens_per_second"] == 400
    assert (speed["all_tokens_per_second"], speed["trained_tokens_per_second"]) == (500, 200)
    assert speed["mfu"] == pytest.approx(8000 * 6e9 / 40 / 1e12) and speed["hfu"] == pytest.approx(1.6)
    assert (speed["data_wait_share"], speed["data_wait_rank"]) == (0.01, 1)
    row = costs.metrics(summary)
    assert row["total/seconds/training"] == 20 and row["memory/reserved_gib/training"] == 6
    assert row["speed/run/data_wait_share"] == 0.01 and row["memory/peak_gib/loading"] == 1
    assert row["total/peak_memory_gib"] == 4
    text = shown(summary)
    for words in (
        "400; 500 with padding; 200 with loss",
        "160.0% of 1 TFLOP/s a device",
        "rank 1",
        "reserved",
    ):
        assert words in text


def test_what_cannot_be_known_is_said_or_left_out() -> None:
    summary = summary_of([rank(20.0, 0.0, [3 * GIB], resets=False)], Peak.of("cpu"))
    assert "mfu" not in summary["speed"] and summary["peak_memory_gib"] == 3
    assert "peak_gib" not in summary["phases"]["training"]
    text = shown(summary)
    assert "set train.peak_tflops" in text and "GiB" not in text and "rank" not in text
    # steps of a version that took no time by phase
    speed = summary_of([rank(20.0, 0.0, [3 * GIB])], Peak.of("cpu"), unmeasured=[5, 6000])["speed"]
    assert (speed["tokens_per_second"], speed["seconds_per_step"]) == (100, 4)
    assert shown({"status": "finished", "tokens": 5, "seconds": 3.0}) == "", "a summary of an earlier version"
    assert shown({"speed": [], "phases": {"training": "x"}, "ranks": "2"})


@pytest.mark.slow
def test_a_run_reports_what_it_took_and_a_resumed_one_of_all_its_parts(tmp_path, cache_dir, capsys) -> None:
    settings = ["train.max_steps=6", "train.eval_every=2", "train.save_every=2", "train.log_every=3"]
    settings += ["train.peak_tflops=0.01"]
    whole, folder = train(tmp_path, cache_dir, *settings, out="whole")
    printed = capsys.readouterr().out
    for words in ("tokens/s", "MFU, HFU", "train.peak_tflops", "waiting for data", "validation", "closing"):
        assert words in printed
    phases = whole["phases"]
    assert list(phases) == ["data", "loading", "training", "validation", "saving", "closing"], "no answers"
    took = sum(phase["seconds"] for phase in phases.values())
    assert took == pytest.approx(whole["seconds"], abs=0.2)
    assert all(phase["peak_gib"] > 0.1 for phase in phases.values())
    assert all(phase["seconds"] > 0 for name, phase in phases.items() if name != "closing"), "no pictures"
    assert whole["speed"]["mfu"] > 0 and whole["all_tokens"] >= whole["tokens"] > whole["trained_tokens"] > 0

    with stopped_after(4):
        first, _ = train(tmp_path, cache_dir, *settings, out="parts")
    resumed, _ = train(tmp_path, cache_dir, *settings, out="parts")
    assert [resumed[name] for name in ("tokens", "all_tokens", "trained_tokens")] == [
        whole[name] for name in ("tokens", "all_tokens", "trained_tokens")
    ]
    both = first["phases"]["training"]["seconds"]
    assert both < resumed["phases"]["training"]["seconds"] < 2 * both + 5
    assert resumed["seconds"] > first["seconds"] - first["phases"]["closing"]["seconds"] - 1
    assert logged(folder)[-1].items() >= {"total/all_tokens": whole["all_tokens"]}.items()


@pytest.mark.slow
def test_what_training_leaves_in_memory_is_not_the_peak_of_loading(tmp_path, cache_dir, monkeypatch) -> None:
    kept: list[bytes] = []

    def fit_and_keep(t: Any) -> Any:
        kept.append(b"x" * (GIB // 2))
        return fit(t)

    fit = run.fit
    monkeypatch.setattr(run, "fit", fit_and_keep)
    phases = train(tmp_path, cache_dir, "train.max_steps=1")[0]["phases"]
    assert phases["closing"]["peak_gib"] > phases["loading"]["peak_gib"] + 0.4


@pytest.mark.long
def test_ranks_are_named_in_the_table_of_a_run(tmp_path, cache_dir, capsys) -> None:
    summary, _ = train(tmp_path, cache_dir, "launch=processes", "dist=ddp", "launch.nproc=2")
    assert summary["ranks"] == 2 and {"slowest_rank", "largest_rank"} <= set(summary["phases"]["training"])
