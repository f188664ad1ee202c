"""Steps that a thread makes ready one ahead: their order, what a checkpoint knows, errors, and the end."""

from __future__ import annotations

import signal
import threading
import traceback
from collections.abc import Generator
from contextlib import closing
from pathlib import Path

import pytest
import torch

from mft.batch import Batch, StepBatches, StepCounts
from mft.data.cache.store import Samples
from mft.errors import UserError
from mft.files.json_file import read_json
from mft.launch.signals import Stop, handlers
from mft.training import prefetch
from mft.training.prefetch import Prefetched
from mft.training.state import State
from mft.training.trace import Trace, digest, read
from tests.tiny_runs import logged, resume, train

CPU = torch.device("cpu")


def data(number: int) -> StepBatches:
    tensors = (torch.full((1, 4), value) for value in (number, 1, 0, 0))
    return StepBatches([Batch(*tensors, torch.arange(4)[None])], 0, number + 1, number / 9)


class Source:
    """Steps 0, 1, 2, ...; notes when each is made, and in which thread. Step `bad` cannot be made."""

    def __init__(self, bad: int | None = None):
        self.bad, self.made, self.closed = bad, list[int](), False
        self.threads: set[str] = set()
        self.ready = threading.Semaphore(0)

    def steps(self, epoch: int, rows_consumed: int, count: int) -> Generator[StepBatches]:
        try:
            for number in range(rows_consumed, rows_consumed + count):
                self.threads.add(threading.current_thread().name)
                if number == self.bad:
                    raise UserError("rows.jsonl:7 is damaged")
                self.made.append(number)
                self.ready.release()
                yield data(number)
        finally:
            self.closed = True


def names() -> list[str]:
    """Returns the threads of the prefetch that do not end."""
    threads = [thread for thread in threading.enumerate() if thread.name == "prefetch"]
    for thread in threads:
        thread.join(30)
    return [thread.name for thread in threads if thread.is_alive()]


def test_the_next_step_is_made_while_one_computes() -> None:
    source, seen = Source(), list[int]()
    for step in Prefetched(source, CPU).steps(0, 2, 4):
        seen.append(step.rows_consumed - 1)
        for _ in range(2 if seen == [2] else 1 if len(seen) < 4 else 0):
            assert source.ready.acquire(timeout=30), "no step was made ready"
        assert source.made[-1] == min(seen[-1] + 1, 5), "one ahead, and none after the last"
        assert step.batches[0].ids_BT[0, 0] == seen[-1]
    assert seen == [2, 3, 4, 5] and not names() and source.closed
    assert source.threads == {"prefetch"}
    assert list(Prefetched(source, CPU).steps(0, 0, 0)) == [] and not names()


def test_an_error_comes_when_its_step_is_due_and_says_where() -> None:
    source, seen = Source(bad=2), list[int]()
    with pytest.raises(UserError, match=r"^rows.jsonl:7 is damaged$") as caught:
        for step in Prefetched(source, CPU).steps(0, 0, 9):
            seen.append(step.rows_consumed - 1)
    assert seen == [0, 1], "the steps before it are trained"
    places = [(frame.name, frame.line) for frame in traceback.extract_tb(caught.value.__traceback__)]
    assert places[-1] == ("steps", 'raise UserError("rows.jsonl:7 is damaged")')
    assert not names() and source.closed


def test_a_step_that_hangs_does_not_hold_up_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prefetch, "PATIENCE", 0.1)
    hanging, go_on = threading.Event(), threading.Event()

    class Hanging(Source):
        def steps(self, epoch: int, rows_consumed: int, count: int) -> Generator[StepBatches]:
            try:
                yield data(0)
                hanging.set()
                go_on.wait(60)
                yield data(1)
            finally:
                self.closed = True

    source = Hanging()
    with (
        pytest.raises(RuntimeError, match="of the step"),
        closing(Prefetched(source, CPU).steps(0, 0, 9)) as steps,
    ):
        next(steps)
        assert hanging.wait(30)
        raise RuntimeError("of the step")
    assert not source.closed
    go_on.set()
    assert not names() and source.closed


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_no_thread_is_left_where_a_run_ends_early(error: type[BaseException]) -> None:
    source = Source()
    with pytest.raises(error), closing(Prefetched(source, CPU).steps(0, 0, 9)) as steps:
        next(steps)
        raise error
    assert not names() and source.closed and source.made in ([0], [0, 1])


def test_a_trace_tells_of_the_step_that_is_trained(tmp_path: Path) -> None:
    """The signal comes in its step too, though the next one is made by then."""
    state, stop = State(), Stop()
    steps = Trace(stop_at=3).steps_of(Prefetched(Source(), CPU), state, tmp_path, rank=0)
    with handlers(stop.request), closing(steps.steps(0, 0, 9)) as coming:
        for step in coming:
            assert stop() == (state.step == 2)
            state.advance(step, StepCounts.of(step.batches, 2))
            if stop():
                break
    assert stop.signal == signal.SIGTERM and (state.step, state.rows_consumed) == (3, 3) and not names()
    assert read(tmp_path) == {0: [(number + 1, digest(data(number).batches)) for number in range(3)]}


SETTINGS = (
    "peft.dropout=0.1",
    "train.max_steps=5",
    "train.save_every=2",
    "train.keep=null",
    "train.log_every=1",
)


@pytest.mark.slow
def test_a_run_and_its_resume_are_the_same_without_it(tmp_path: Path, cache_dir: Path) -> None:
    _, ahead = train(tmp_path, cache_dir, *SETTINGS, out="ahead")
    _, between = train(tmp_path, cache_dir, *SETTINGS, "train.prefetch=false", out="between")
    assert logged(ahead) == logged(between)
    states = [run / "checkpoints" / "step-4" / "state" for run in (ahead, between)]
    for name in ("shard-0.safetensors", "optimizer-0.safetensors"):
        assert (states[0] / name).read_bytes() == (states[1] / name).read_bytes()
    places = [read_json(state / "loop.json").number("rows_consumed") for state in states]
    assert places[0] == places[1] is not None
    rows = logged(ahead)
    resume(tmp_path, cache_dir, *SETTINGS, step=2, out="ahead")
    assert logged(ahead) == rows and not names()


@pytest.mark.slow
def test_a_run_that_cannot_read_a_step_saves_nothing_of_it(
    tmp_path: Path, cache_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The third step's rows: steps 1 and 2 are trained, and the checkpoint of step 2 stands before it."""
    load, main = Samples.load, threading.main_thread()
    loads: list[int] = []

    def failing(samples: Samples, rows: list) -> list:
        if threading.current_thread() is not main:
            loads.append(len(rows))
            if len(loads) == 3:
                raise UserError("The token cache is damaged")
        return load(samples, rows)

    with monkeypatch.context() as patch, pytest.raises(UserError, match="The token cache is damaged"):
        patch.setattr(Samples, "load", failing)
        train(tmp_path, cache_dir, *SETTINGS)
    run = tmp_path / "run"
    assert [row["step"] for row in logged(run) if "train/loss" in row] == [1, 2] and not names()
    summary, _ = train(tmp_path, cache_dir, *SETTINGS)
    assert summary["status"] == "finished"
    assert [row["step"] for row in logged(run) if "train/loss" in row] == [1, 2, 3, 4, 5]
