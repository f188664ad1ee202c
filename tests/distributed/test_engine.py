"""Engines: shares add up over any layout, state round trips bit for bit, and an engine is what it was asked
to be."""

from __future__ import annotations

import math
import os
import random
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch
from accelerate.utils import patch_environment

from mft.distributed import accelerator
from mft.distributed.ddp import Ddp, DdpEngine, Single
from mft.distributed.engine import Engine
from mft.errors import UserError
from tests.distributed.ranks import run_ranks

ROWS = (7, 1, 4, 2)
"""Rows of the four micro-batches of a step: uneven, so that a mean of means would be wrong."""


class Model(torch.nn.Module):
    """Small, with dropout (draws random numbers) and a frozen layer (as an adapter's base)."""

    def __init__(self, dropout: float = 0.0):
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.base = torch.nn.Linear(6, 8).requires_grad_(False)
        self.hidden = torch.nn.Linear(8, 8)
        self.drop = torch.nn.Dropout(dropout)
        self.head = torch.nn.Linear(8, 1)
        for parameter in self.parameters():
            parameter.data = torch.randn(parameter.shape, generator=generator)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.drop(torch.tanh(self.hidden(self.base(x))))).squeeze(1)


def micro_batches(step: int) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(step)
    return [torch.randn(rows, 6, generator=generator) for rows in ROWS]


def prepared(engine: Engine, dropout: float = 0.0, kind: type[Model] = Model) -> tuple[torch.nn.Module, Any]:
    model = kind(dropout)
    trained = [p for p in model.parameters() if p.requires_grad]
    return engine.prepare(model, torch.optim.AdamW(trained, lr=0.1))


def train(
    engine: Engine, module: torch.nn.Module, optimizer: Any, steps: range, clip: float | None
) -> list[float]:
    """Deals each step's micro-batches to the ranks and returns the gradient norms."""
    norms = []
    for step in steps:
        mine = micro_batches(step)[engine.rank :: engine.world]
        rows = engine.sum(torch.tensor(float(sum(map(len, mine))), dtype=torch.float64))
        for i, x in enumerate(mine):
            with engine.accumulating(last=i == len(mine) - 1):
                engine.backward((module(x) - 1.0).square().sum() / rows)
        norms.append(engine.step(clip))
    return norms


def trained(engine: Engine) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in engine.full_state(trainable=True).items()}


def partition(backend: Single | Ddp, clip: float | None) -> tuple[list[float], dict[str, torch.Tensor]]:
    engine = backend.start("fp32", cpu=True)
    module, optimizer = prepared(engine)
    norms = train(engine, module, optimizer, range(3), clip)
    state = trained(engine)
    engine.close()
    return norms, state


def interrupted(backend: Single | Ddp, folder: Path) -> dict[str, Any]:
    """Six steps with dropout, saved after three; then again from what was saved."""
    engine = backend.start("fp32", cpu=True)
    random.seed(engine.rank)
    numpy.random.seed(engine.rank)
    torch.manual_seed(engine.rank)
    module, optimizer = prepared(engine, dropout=0.5)
    train(engine, module, optimizer, range(3), 1.0)
    engine.save_state(folder)
    draws = [random.random(), float(numpy.random.rand()), float(torch.rand(1))]
    norms = train(engine, module, optimizer, range(3, 6), 1.0)
    state = trained(engine)
    engine.close()

    engine = backend.start("fp32", cpu=True)
    torch.manual_seed(99)
    module, optimizer = prepared(engine, dropout=0.5)
    for parameter in module.parameters():
        parameter.data.mul_(1.5 if parameter.requires_grad else 1.0)
    exact = engine.load_state(folder)
    draws_again = [random.random(), float(numpy.random.rand()), float(torch.rand(1))]
    norms_again = train(engine, module, optimizer, range(3, 6), 1.0)
    state_again = trained(engine)
    engine.close()
    same = all(torch.equal(state[name], state_again[name]) for name in state)
    return {"exact": exact, "same": same, "draws": (draws, draws_again), "norms": (norms, norms_again)}


def poisoned(backend: Any, kind: type[Model] = Model) -> dict[str, Any]:
    """One rank's second step has a NaN; then a clean step."""
    engine = backend.start("fp32", cpu=True)
    module, optimizer = prepared(engine, kind=kind)
    train(engine, module, optimizer, range(1), None)
    before = trained(engine)
    share = module(micro_batches(1)[0]).sum()
    engine.backward(share * (float("nan") if engine.rank == engine.world - 1 else 1.0))
    norm = engine.step(1.0)
    after = trained(engine)
    unchanged = all(torch.equal(before[name], after[name]) for name in before)
    zeroed = all(parameter.grad is None for parameter in module.parameters())
    (clean,) = train(engine, module, optimizer, range(1, 2), None)
    skipped = engine.skipped
    engine.close()
    return {"norm": norm, "unchanged": unchanged, "zeroed": zeroed, "clean": clean, "skipped": skipped}


def facts() -> dict[str, Any]:
    engine = Ddp().start("fp32")
    ones = torch.ones(2, dtype=torch.float64)
    return {
        "rank": (engine.rank, engine.local_rank, engine.world, engine.is_main),
        "sum": engine.sum(ones + engine.rank),
        "kept": ones,
        "gathered": engine.gather({"rank": engine.rank}),
        "single": refusal(lambda: Single().start("fp32")),
        "closed": engine.close(),
    }


def refusal(call: Any) -> str:
    try:
        call()
    except UserError as error:
        return str(error)
    return ""


def cases(folder: Path) -> dict[str, Any]:
    """Everything that is tested in two ranks, in one start."""
    return {
        "facts": facts(),
        "partition": {clip: partition(Ddp(), clip) for clip in (None, 0.5)},
        "resume": interrupted(Ddp(), folder),
        "poisoned": poisoned(Ddp()),
        "bf16": short(Ddp(), "bf16"),
    }


def short(backend: Single | Ddp, precision: str) -> dict[str, Any]:
    engine = backend.start(precision, cpu=True)
    module, optimizer = prepared(engine)
    out = module(micro_batches(0)[0])
    return {
        "dtype": str(out.dtype),
        "norm": train(engine, module, optimizer, range(1), 1.0),
        "close": engine.close(),
    }


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    return run_ranks(2, cases, tmp_path_factory.mktemp("state") / "two")


def assert_same(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> None:
    assert first.keys() == second.keys() == {"hidden.weight", "hidden.bias", "head.weight", "head.bias"}
    for name, value in first.items():
        # fp32 sums in another order: one unit in the last place, through three steps of AdamW
        torch.testing.assert_close(value, second[name], rtol=1e-5, atol=1e-6)


@pytest.mark.slow
@pytest.mark.dist
@pytest.mark.parametrize("clip", [None, 0.5])
def test_two_ranks_do_what_one_does(two: list[dict[str, Any]], clip: float | None) -> None:
    norms, state = partition(Single(), clip)
    for rank in two:
        rank_norms, rank_state = rank["partition"][clip]
        assert rank_norms == pytest.approx(norms, rel=1e-5)
        assert_same(state, rank_state)
    assert two[0]["partition"][clip][0] == two[1]["partition"][clip][0]


def test_ddp_of_one_rank_does_what_single_does() -> None:
    norms, state = partition(Single(), 0.5)
    ddp_norms, ddp_state = partition(Ddp(), 0.5)
    assert ddp_norms == pytest.approx(norms, rel=1e-6)
    assert_same(state, ddp_state)


def test_clipping_limits_the_update_and_reports_the_norm_before() -> None:
    norms, state = partition(Single(), None)
    clipped_norms, clipped = partition(Single(), 0.5)
    assert norms[0] == clipped_norms[0] > 0.5
    assert any(not torch.equal(state[name], clipped[name]) for name in state)


@pytest.mark.slow
@pytest.mark.dist
def test_the_norm_of_a_large_gradient_is_that_of_float64() -> None:
    """torch's own norm on a CPU is 2e-4 too low for so many values."""
    gradient = torch.randn(2**15, 2**8, generator=torch.Generator().manual_seed(0))
    module = torch.nn.Embedding(*gradient.shape)
    engine = Single().start("fp32")
    module, _ = engine.prepare(module, torch.optim.SGD(module.parameters(), lr=0.1))
    engine.backward((next(module.parameters()) * gradient).sum())
    norm = engine.step(1.0)
    engine.close()
    assert norm == pytest.approx(float(gradient.double().norm()), rel=1e-6)


def test_ranks_know_themselves_and_add_up(two: list[dict[str, Any]]) -> None:
    for rank, result in enumerate(two):
        found = result["facts"]
        assert found["rank"] == (rank, rank, 2, rank == 0)
        assert found["sum"].tolist() == [3.0, 3.0] and found["sum"].dtype == torch.float64
        assert found["kept"].tolist() == [1.0, 1.0]
        assert found["gathered"] == [{"rank": 0}, {"rank": 1}]
        assert "dist=single with 2 ranks" in found["single"]


@pytest.mark.slow
@pytest.mark.dist
def test_a_nan_on_one_rank_stops_both(two: list[dict[str, Any]]) -> None:
    for result in two:
        found = result["poisoned"]
        assert (
            found["norm"] != found["norm"] and found["unchanged"] and found["zeroed"] and not found["skipped"]
        )
    assert two[0]["poisoned"]["clean"] == two[1]["poisoned"]["clean"] > 0


def test_a_nan_updates_nothing() -> None:
    found = poisoned(Single())
    assert found["norm"] != found["norm"] and found["unchanged"] and found["zeroed"]


@pytest.mark.slow
@pytest.mark.dist
def test_two_ranks_resume_bit_for_bit(two: list[dict[str, Any]]) -> None:
    for result in two:
        check_resumed(result["resume"])
    assert two[0]["resume"]["draws"] != two[1]["resume"]["draws"]


@pytest.mark.parametrize("backend", [Single(), Ddp()])
def test_resumed_is_uninterrupted(tmp_path: Path, backend: Single | Ddp) -> None:
    check_resumed(interrupted(backend, tmp_path / "state"))


def check_resumed(found: dict[str, Any]) -> None:
    assert found["exact"] and found["same"]
    assert found["draws"][0] == found["draws"][1]
    assert found["norms"][0] == found["norms"][1]


def test_another_layout_is_restored_but_not_called_exact(tmp_path: Path) -> None:
    interrupted(Single(), tmp_path)
    engine = Ddp().start("fp32", cpu=True)
    prepared(engine)
    assert engine.load_state(tmp_path) is False
    engine.close()


def test_a_state_that_does_not_fit_is_refused(tmp_path: Path) -> None:
    engine = Single().start("fp32", cpu=True)
    module, _ = prepared(engine)
    with pytest.raises(UserError, match=r"engine\.json is missing"):
        engine.load_state(tmp_path)
    engine.save_state(tmp_path)
    module.base.requires_grad_(True)
    with pytest.raises(UserError, match=r"2 parameters are only in one of them, e\.g\. base\.bias"):
        engine.load_state(tmp_path)
    engine.close()


def test_what_is_saved_has_no_wrapper_in_its_names() -> None:
    engine = Ddp().start("fp32", cpu=True)
    module, _ = prepared(engine)
    assert type(module).__name__ == "DistributedDataParallel"
    assert set(engine.full_state()) == set(Model().state_dict())
    engine.close()


@pytest.mark.parametrize("backend", [Single(), Ddp()])
def test_bf16_computes_under_autocast_and_returns_fp32(backend: Single | Ddp) -> None:
    exact, rounded = short(backend, "fp32"), short(backend, "bf16")
    assert exact["dtype"] == rounded["dtype"] == "torch.float32"
    assert rounded["norm"] != exact["norm"]
    assert rounded["norm"] == pytest.approx(exact["norm"], rel=0.05)


def prepared_with_scaler(
    engine: Engine, scale: float, fused: bool = True, kind: type[Model] = Model
) -> torch.nn.Module:
    """Returns a module that computes in fp32 and whose losses are scaled as in fp16: accelerate makes a loss
    scaler on GPUs only; torch's works on a CPU, so the path is walked here by giving it one."""
    engine.accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=scale)
    model = kind()
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    module, _ = engine.prepare(model, torch.optim.AdamW(parameters, lr=0.1, fused=fused))
    engine.accelerator.state._mixed_precision, engine.accelerator.native_amp = "fp16", True
    return module


def overflowed(backend: Any, fused: bool, kind: type[Model] = Model) -> dict[str, Any]:
    """A clean step, one whose gradient overflows on the last rank, a clean one; what each of them did."""
    engine = backend.start("fp32", cpu=True)
    module = prepared_with_scaler(engine, 8.0, fused, kind)
    found: dict[str, Any] = {"finite": [], "skipped": [], "scale": [], "changed": []}
    for step, factor in enumerate((1.0, float("inf"), 1.0)):
        before = trained(engine)
        share = module(micro_batches(step)[0]).sum()
        engine.backward(share * (factor if engine.rank == engine.world - 1 else 1.0))
        found["finite"].append(math.isfinite(engine.step(1.0)))
        found["skipped"].append(engine.skipped)
        found["scale"].append(engine.accelerator.scaler.get_scale())
        # of a divided model rank 0 alone is given the whole weights
        found["changed"].append(any(not torch.equal(v, before[n]) for n, v in trained(engine).items()))
    engine.close()
    return found


OVERFLOWED = {
    "finite": [True, False, True],
    "skipped": [False, True, False],
    "scale": [8.0, 4.0, 4.0],
    "changed": [True, False, True],
}


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("backend", [Single(), Ddp()])
def test_an_overflow_that_the_loss_scaler_answers_is_skipped_and_no_error(
    backend: Single | Ddp, fused: bool
) -> None:
    assert overflowed(backend, fused) == OVERFLOWED


def test_a_norm_beyond_float32_of_finite_gradients_updates_nothing_and_is_an_error() -> None:
    engine = Single().start("fp32", cpu=True)
    module = prepared_with_scaler(engine, 1.0)
    before = trained(engine)
    engine.backward(module(micro_batches(0)[0]).sum() * 1e25)
    assert all(p.grad.isfinite().all() for p in module.parameters() if p.grad is not None)
    assert not math.isfinite(engine.step(1.0))
    assert not engine.skipped and engine.accelerator.scaler.get_scale() == 1.0  # a smaller one would not help
    assert all(torch.equal(value, before[name]) for name, value in trained(engine).items())
    engine.close()


def test_a_precision_that_a_cpu_does_not_have_is_refused() -> None:
    with pytest.raises(UserError, match=r"train\.precision=fp16 needs a GPU"):
        Single().start("fp16", cpu=True)


def test_a_gpu_that_torch_cannot_use_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """As where the driver is older than torch's CUDA. None is here: what the driver shows is given."""
    monkeypatch.setattr(accelerator, "visible_gpus", lambda: 1)
    with pytest.raises(UserError, match=r"the driver shows a GPU, but torch .* cannot use it; update"):
        Single().start("fp32")
    Single().start("fp32", cpu=True).close()


def test_single_refuses_several_ranks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "4")
    with pytest.raises(UserError, match=r"dist=single with 4 ranks: choose dist=ddp, or launch\.nproc=1"):
        Single().start("fp32", cpu=True)


def test_single_is_single_also_where_a_launcher_left_its_variables() -> None:
    with patch_environment(RANK=0, WORLD_SIZE=1, LOCAL_RANK=0, LOCAL_WORLD_SIZE=1):
        engine = Single().start("fp32", cpu=True)
        assert os.environ["WORLD_SIZE"] == "1"
        module, _ = prepared(engine)
        assert type(module) is Model and not torch.distributed.is_initialized()
        engine.close()


class Impostor(DdpEngine):
    """Claims to be DDP whatever came up."""


def test_an_engine_proves_what_it_is() -> None:
    engine = Single().start("fp32", cpu=True)
    with pytest.raises(
        UserError, match="dist=ddp did not start as configured: accelerate reports NO with 1 processes"
    ):
        Impostor(engine.accelerator, owns_group=False)
    engine.wrapper = "DistributedDataParallel"
    with pytest.raises(UserError, match="the model is a Model, not a DistributedDataParallel"):
        prepared(engine)
    engine.close()


def test_conf_dist_is_the_only_voice(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "fp8")
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    with pytest.warns(UserWarning, match="ACCELERATE_MIXED_PRECISION, ACCELERATE_USE_FSDP"):
        engine = Single().start("fp32", cpu=True)
    assert "ACCELERATE_USE_FSDP" not in os.environ and engine.accelerator.mixed_precision == "no"
    engine.close()
