"""How often the host waits for its GPU in a step: in no micro-batch, and in a step at most three times.

Counted on the device that `tests.pretend_gpu` gives; it says what counts as a wait. The real loop trains a
tiny model through it, without a thread for the data, since what it watches is one thread.
"""

from __future__ import annotations

from collections.abc import Generator, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from mft.batch import StepBatches
from mft.model.causal_lm import CausalLM
from mft.model.peft.lora import Lora
from mft.model.token_loss import TokenLoss
from mft.training.loop import fit
from mft.training.metrics import Meter
from mft.training.profile import StepProfile
from mft.training.trainer import Trainer
from tests.loss.loop import Layout, Recorder, Stage, write_tasks
from tests.loss.modes import MODES, made
from tests.model.mixtures import family_of, mixture
from tests.model.rows import batch
from tests.pretend_gpu import GPU, OnGpu, Watch, move, watched
from tests.selection import long

ALWAYS = ["float() of the gradient's norm", "the logged row"]
BESIDES = {
    "famo": ["statistics", "losses before the update", "losses after it"],
    "famo_valid": ["probe", "statistics", "losses before the update"],
    "task_focal": ["statistics"],
    "coba": ["probe"],
    "self_paced": ["probe"],
    "dwa": ["losses before the update"],
    "lbtw": ["losses before the update"],
    "uncertainty": ["losses before the update"],
}
"""What a mode reads of the device in each step, besides; a probe of coba or self_paced is not due in each."""

ACCUMULATION = 3
LAYOUTS = {"packed": True, "padded": False}
PEFT = {"full": None, "lora": Lora(rank=4, dropout=0.1)}


class Enough(Exception):
    """Ends a run after its second step."""


class Source:
    """Two steps of a loader; notes the waits of the second."""

    def __init__(self, loader: Any, watch: Watch):
        self.loader, self.watch, self.waits = loader, watch, list[str]()

    def steps(self, epoch: int, rows_consumed: int, count: int) -> Generator[StepBatches]:
        for data in self.loader.steps(epoch, rows_consumed, 2):
            before = len(self.watch.waits)
            assert len(data.batches) == ACCUMULATION
            yield data
            self.waits = self.watch.waits[before:]
        raise Enough


@pytest.fixture(scope="module")
def stages(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Stage]]:
    root = tmp_path_factory.mktemp("waits")
    write_tasks(root / "tasks")
    # one engine for both: it is the same, and there is one of a process
    found = {"packed": Stage(root, Layout(ACCUMULATION, True, "single"))}
    found["packed"].engine.close()
    found["padded"] = Stage(root, Layout(ACCUMULATION, False, "single"))
    found["packed"].engine = found["padded"].engine
    yield found
    found["padded"].engine.close()


@contextmanager
def on_gpu(stage: Stage, mode: str, peft: str = "full") -> Iterator[tuple[Trainer, Watch]]:
    """Gives a run whose engine says that its device is the pretended one."""
    t = stage.training(made(mode), Recorder(), steps=4, peft=PEFT[peft])
    with pytest.MonkeyPatch.context() as patch, watched() as watch:
        move(t.module, t.optimizer)
        patch.setattr(t.engine, "device", GPU)
        t.meter = Meter(t.names, GPU, peak_tflops=1.0)
        yield t, watch


def waits_of_a_step(
    stage: Stage, mode: str, peft: str, world: int = 1, profile: StepProfile | None = None
) -> list[str]:
    with pytest.MonkeyPatch.context() as patch, on_gpu(stage, mode, peft) as (t, watch):
        patch.setattr(t.engine, "world", world)
        patch.setattr(torch.distributed, "all_reduce", lambda tensor: None)
        source = t.loader = Source(t.loader, watch)
        t.profile = profile or t.profile
        with pytest.raises(Enough):
            fit(t)
    return source.waits


@pytest.mark.parametrize("mode", MODES)
def test_the_host_waits_in_no_micro_batch(stages: dict[str, Stage], mode: str) -> None:
    waits = waits_of_a_step(stages["packed"], mode, "lora")
    assert len(waits) == len(ALWAYS) + len(BESIDES.get(mode, [])), "\n".join(waits)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("peft", "layout"), [long("full", "packed"), long("lora", "padded"), ("full", "padded")]
)
def test_nor_in_other_layouts(stages: dict[str, Stage], peft: str, layout: str) -> None:
    for mode in MODES:
        waits = waits_of_a_step(stages[layout], mode, peft)
        assert len(waits) == len(ALWAYS) + len(BESIDES.get(mode, [])), f"{mode}: {waits}"


def test_several_ranks_wait_once_more_for_the_counts(stages: dict[str, Stage]) -> None:
    """The exchange itself is not there: two ranks are told to this one."""
    assert len(waits_of_a_step(stages["packed"], "task_token_mean", "lora", world=2)) == 3


def test_a_profile_of_later_steps_adds_no_wait(stages: dict[str, Stage], tmp_path: Path) -> None:
    profile = StepProfile(tmp_path)
    assert not profile.choose(0, 100) and profile.steps[0] > 3
    assert len(waits_of_a_step(stages["packed"], "task_token_mean", "lora", profile=profile)) == len(ALWAYS)


def test_a_validation_waits_once(stages: dict[str, Stage]) -> None:
    with on_gpu(stages["packed"], "token_mean") as (t, watch):
        assert len(list(t.evaluator.batches())) > 2 and not watch.waits
        assert t.validate() and len(watch.waits) == 1, watch.waits


def of_a_micro_batch(model: torch.nn.Module, family: CausalLM, rows: list[list[int]]) -> list[str]:
    """Returns the waits of the second forward and backward of a model."""
    module = TokenLoss(model, family)
    with watched() as watch:
        move(module)
        for _ in range(2):  # the first one tries what the class does
            watch.waits.clear()
            nll_BT, router = module(batch(rows, 24, 512).to(GPU))
            (nll_BT.sum() + router).backward()
    return watch.waits


@pytest.mark.parametrize("checkpointing", [False, True])
def test_nor_does_a_mixture_of_experts(checkpointing: bool) -> None:
    """Its router loss is taken; transformers multiplies by all experts at once, as on a GPU of this age."""
    model = mixture("qwen2_moe").train()
    if checkpointing:
        model.gradient_checkpointing_enable()
    family = family_of("qwen2_moe")
    assert TokenLoss(model, family).router_coef > 0
    assert of_a_micro_batch(model, family, [[9, 1, 12], [20]]) == []


def test_a_model_that_transformers_makes_the_mask_of_waits_for_it_once() -> None:
    config = transformers.CodeGenConfig(n_embd=64, n_head=4, n_layer=2, rotary_dim=8, vocab_size=512)
    model = transformers.AutoModelForCausalLM.from_config(config)
    waits = of_a_micro_batch(model, CausalLM("unused"), [[9, 1, 12], [20]])
    assert len(waits) == 1 and "masking_utils" in waits[0]


def test_what_waits_is_seen() -> None:
    def blocking(tensor: torch.Tensor) -> None:
        tensor.to(GPU)
        tensor.to(GPU, non_blocking=True)
        tensor.pin_memory().to(GPU)

    with watched() as watch:
        on_cpu = torch.arange(4)
        there = on_cpu.pin_memory().to(GPU, non_blocking=True)
        added = (there + 1).double()[None].sum(1)
        assert watch.waits == [] and there.device == added.device == GPU
        assert there.cpu().tolist() == [0, 1, 2, 3] and len(watch.waits) == 1
        reading = (
            *(torch.nonzero, torch.unique, torch.bincount, OnGpu.tolist, blocking),
            *(lambda x: x[x > 1], lambda x: x[0].item(), lambda x: bool(x.any()), lambda x: x[on_cpu]),
            *(lambda x: x.masked_select(x > 1), lambda x: on_cpu.copy_(x), lambda x: torch.equal(x, x)),
        )
        for read in reading:
            watch.waits.clear()
            read(on_cpu if read is blocking else there)
            assert len(watch.waits) == (3 if read is blocking else 1), (read, watch.waits)
        with pytest.raises(RuntimeError, match="both devices"):
            there + on_cpu
