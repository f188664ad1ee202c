"""The micro-batch that train.per_device_batch_size=auto finds.

How much memory there is and how much is used is given, since a machine has another amount free at every
moment, and no GPU is here. All else of the runs is real.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from mft.assembly import micro_batch
from mft.assembly.micro_batch import search
from mft.batch import BatchSizes
from mft.errors import UserError
from mft.estimate.room import Host, Room
from mft.files.json_file import read_json
from mft.run_folder import MICRO_BATCH
from tests.tiny_runs import logged, stopped_after, train

AUTO = ("train.per_device_batch_size=auto", "train.global_batch_size=16", "peft.dropout=0.1", "loss=famo")
GIB = 2**30
STEPS = ("train.max_steps=4", "train.save_every=2")


class Measured(Room):
    """A device on which so many trials fit: 1 and 4 rows, 16 after them."""

    def __init__(self, trials: int, device: str = "CPU, 8.0 GiB", whole: float = 100.0):
        super().__init__(10 * GIB, whole * GIB, "given by the test", device)
        self.trials = trials

    def reset(self) -> None:
        self.trials -= 1

    def used(self) -> float:
        return 1.0 * GIB

    def peak(self) -> float:
        return 2.0 * GIB if self.trials >= 0 else 50.0 * GIB


def ranks(*rooms: float) -> Callable[[Any], list[Any]]:
    """Returns the `gather` of a rank beside others that have so much room more or less than it."""

    def gather(value: Any) -> list[Any]:
        if isinstance(value, tuple):
            return [value, *((value[0], value[1] + other, value[2]) for other in rooms)]
        return [value, *(value for _ in rooms)]

    return gather


def linear(tried: list[int], fixed: float = 10.0, row: float = 3.0) -> Callable[[int], tuple[float, float]]:
    """Returns a trial on a device where a micro-batch takes so much, in GiB; `tried` collects the sizes."""

    def trial(size: int) -> tuple[float, float]:
        tried.append(size)
        return fixed, fixed + row * size

    return trial


@pytest.mark.parametrize(
    ("rows", "limit", "found", "tried"),
    [
        (64, 30.0, 4, [1, 4]),  # 10 + 3 x 4 = 22, 8 rows are predicted to be too large and not tried
        (64, 40.0, 8, [1, 4, 8]),
        (64, 1000.0, 64, [1, 4, 16, 64]),
        (12, 29.0, 6, [1, 4, 6]),
        (7, 30.0, 1, [1]),  # a divisor of 7 is 1 or 7
        (7, 31.0, 7, [1, 7]),
        (1, 30.0, 1, [1]),
        (64, 12.0, 1, [1]),  # not even one row: the caller says so
    ],
)
def test_the_largest_divisor_within_the_limit_is_found_and_none_above_it_is_tried(
    rows: int, limit: float, found: int, tried: list[int]
) -> None:
    seen: list[int] = []
    best = search(rows, linear(seen), Room(limit, 80.0, "", ""), ranks())
    assert (best.rows, best.peak, best.limit, seen) == (found, 10 + 3 * found, limit, tried)


def test_all_ranks_take_what_fits_on_the_one_with_the_least_room() -> None:
    seen: list[int] = []
    best = search(64, linear(seen), Room(40.0, 80.0, "", ""), ranks(0.0, -15.0))
    assert (best.rows, best.limit) == (4, 25.0)


def test_a_peak_above_its_prediction_steps_down_by_what_was_measured() -> None:
    seen: list[int] = []

    def trial(size: int) -> tuple[float, float]:  # not a line
        seen.append(size)
        return 10.0, 10.0 + 0.35 * size**2

    assert search(16, trial, Room(95.0, 200.0, "", ""), ranks()).rows == 8
    assert seen == [1, 4, 16, 8]


def test_a_gpu_tries_two_rows_although_one_row_predicts_too_much_and_memory_may_run_out() -> None:
    def trial(fixed: float, size: int) -> tuple[float, float]:
        peak = 10.0 + fixed + size
        return 10.0, math.inf if peak > 20.0 else peak

    # the logits' chunk does not grow with the rows: 18 for one row, 19 for two
    room = Room(19.0, 20.0, "", "")
    assert search(64, lambda size: trial(7.0, size), room, ranks(), may_fail=True).rows == 2
    assert search(64, lambda size: trial(7.0, size), room, ranks(), may_fail=False).rows == 1
    assert search(64, lambda size: trial(9.5, size), room, ranks(), may_fail=True).rows == 1


class PretendedGpu:
    """A GPU of 80 GiB, of which 2 are not torch's. A rank holds `held` GiB there and takes `row` more a row."""

    def __init__(self, patch: pytest.MonkeyPatch, held: float, row: float):
        self.held, self.row, self.taken, self.shown, self.tried = held, row, held, "", 0
        self.failing: Exception = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")
        self.sizes, self.training = BatchSizes(1, 64, 1, found=False), True
        given = {
            "mem_get_info": lambda device: (70 * GIB, 80 * GIB),
            "memory_reserved": lambda device: 8 * GIB,
            "get_device_name": lambda device: "H100",
            "memory_allocated": lambda device: self.held * GIB,
            "max_memory_allocated": lambda device: self.taken * GIB,
            "reset_peak_memory_stats": lambda device: setattr(self, "taken", self.held),
            "empty_cache": lambda: None,
        }
        for name, value in given.items():
            patch.setattr(torch.cuda, name, value)

    def largest(self, rows: int) -> Any:
        return SimpleNamespace(to=lambda device: rows)

    def train(self, mode: bool = True) -> None:
        """Does what a module has to."""

    def __call__(self, rows: int) -> tuple[torch.Tensor, float]:
        need = self.held + self.row * rows
        if need > 78:
            raise self.failing
        self.taken = max(self.taken, need)
        return torch.zeros(rows, 1), 0.0

    def try_out(self, shares: Sequence[Callable[[], Any]]) -> None:
        self.tried += 1
        for share in shares:
            share()

    def find(self, folder: Path, divided: bool = False, world: int = 1) -> None:
        """Finds the micro-batch with this as engine's device, model and data."""
        engine = SimpleNamespace(
            device=torch.device("cuda", 0),
            divided=divided,
            world=world,
            is_main=True,
            try_out=self.try_out,
            gather=lambda value: [value] * world,
        )
        run: Any = SimpleNamespace(
            engine=engine,
            folder=folder,
            data_settings=SimpleNamespace(seq_length=4096),
            progress=SimpleNamespace(show=lambda text: setattr(self, "shown", text)),
        )
        micro_batch.find(run, self, self, coming=5.0 * GIB)  # type: ignore[arg-type]


def test_a_gpu_is_filled_to_nine_tenths_less_what_others_hold_and_the_optimizer_will(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    gpu = PretendedGpu(monkeypatch, held=20.0, row=1.3)
    gpu.find(tmp_path)
    # 90 % of 80 less 2: 70; 20 + 5 + 32 x 1.3 = 66.6, and 64 rows would be 108
    assert gpu.sizes == BatchSizes(32, 2, 1)
    assert "32 rows, 2 micro-batches of a step on each rank; 66.6 GiB at the peak" in gpu.shown
    assert "with 5.0 GiB for the optimizer's states, limit 70.0 GiB (90% of H100, 80.0 GiB" in gpu.shown
    assert "; searched for " in gpu.shown
    again = PretendedGpu(monkeypatch, held=60.0, row=1.3)
    again.find(tmp_path)
    assert again.sizes == gpu.sizes and again.tried == 0, "it was measured again"


def test_memory_that_runs_out_is_a_smaller_size_or_a_sentence(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    gpu = PretendedGpu(monkeypatch, held=40.0, row=20.0)
    gpu.find(tmp_path)
    assert gpu.sizes.per_device == 1 and gpu.tried == 3, "two rows ran out, and what they left was dropped"
    gpu = PretendedGpu(monkeypatch, held=40.0, row=20.0)
    gpu.failing = RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling cublasCreate")
    gpu.find(tmp_path / "cublas")
    assert gpu.sizes.per_device == 1
    for divided, world in ((False, 1), (True, 2)):
        gpu = PretendedGpu(monkeypatch, held=60.0, row=20.0)
        with pytest.raises(UserError, match=r"not even one row of data\.seq_length=4096 tokens fits: "):
            gpu.find(tmp_path / "other", divided, world)


@pytest.fixture
def room(monkeypatch: pytest.MonkeyPatch) -> Callable[[Room], None]:
    def give(room: Room) -> None:
        monkeypatch.setattr(Host, "of", lambda processes: room)

    return give


def same_run(one: Path, two: Path) -> bool:
    name = "final/adapter_model.safetensors"
    first, second = load_file(one / name), load_file(two / name)
    same = all(torch.equal(value, second[key]) for key, value in first.items())
    return same and logged(one) == logged(two)


@pytest.mark.slow
def test_the_run_is_the_one_with_that_size_to_the_bit_also_resumed_and_says_what_it_found(
    tmp_path: Path, cache_dir: Path, room: Callable[[Room], None], capsys: pytest.CaptureFixture[str]
) -> None:
    _, by_hand = train(tmp_path, cache_dir, *AUTO, *STEPS, "train.per_device_batch_size=4", out="hand")
    room(Measured(trials=2))  # 1 and 4 rows fit, 16 do not, nor 8
    with stopped_after(2):
        _, run_dir = train(tmp_path, cache_dir, *AUTO, *STEPS, out="auto")
    said = capsys.readouterr().out
    assert "auto: 4 rows, 4 micro-batches of a step on each rank; " in said
    assert "16 rows = 4 x 4 micro-batches x 1 ranks" in said
    assert read_json(run_dir / MICRO_BATCH)["per_device_batch_size"] == 4
    room(Measured(trials=99))  # there is more room now: the run goes on as it began
    train(tmp_path, cache_dir, *AUTO, *STEPS, out="auto")
    assert "4 rows, 4 micro-batches of a step on each rank, as this run found" in capsys.readouterr().out
    assert same_run(by_hand, run_dir)


@pytest.mark.slow
def test_on_another_device_a_resumed_run_searches_anew_and_its_losses_agree_to_rounding(
    tmp_path: Path, cache_dir: Path, room: Callable[[Room], None], capsys: pytest.CaptureFixture[str]
) -> None:
    given = (*AUTO, *STEPS, "peft.dropout=0.0", "train.log_every=1")
    room(Measured(trials=2))
    with stopped_after(2):
        _, run_dir = train(tmp_path, cache_dir, *given, out="auto")
    room(Measured(trials=99, device="CPU, 64.0 GiB"))
    train(tmp_path, cache_dir, *given, out="auto")
    assert "searched anew, since this run found 4 rows on 1 x CPU, 8.0 GiB" in capsys.readouterr().out
    assert read_json(run_dir / MICRO_BATCH)["per_device_batch_size"] == 16
    _, by_hand = train(tmp_path, cache_dir, *given, "train.per_device_batch_size=8", out="hand")
    for one, two in zip(logged(run_dir), logged(by_hand), strict=True):
        # a row is padded to the longest of its micro-batch, which is another one
        padding = dict.fromkeys(("data/fill", "total/all_tokens"), 0)
        assert one | padding == pytest.approx(two | padding, rel=1e-5)


@pytest.mark.slow
def test_this_machine_is_measured_and_one_row_that_does_not_fit_is_refused(
    tmp_path: Path, cache_dir: Path, room: Callable[[Room], None]
) -> None:
    _, run_dir = train(tmp_path, cache_dir, *AUTO, "train.max_steps=1")
    found = read_json(run_dir / MICRO_BATCH)
    assert found["per_device_batch_size"] == 16 and 0 < found["peak_bytes"] < found["limit_bytes"]
    room(Measured(trials=0, whole=20.0))
    with pytest.raises(UserError, match=r"not even one row of data\.seq_length=\d+ tokens fits: .* Lower"):
        train(tmp_path, cache_dir, *AUTO, out="refused")
