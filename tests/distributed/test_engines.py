"""What conf/dist says is what the live engine does: its settings, its exchanges of gradients, a NaN on one
rank."""

from __future__ import annotations

import os
from typing import Any

import pytest
import torch

from mft.config.build import build
from mft.distributed.deepspeed import Zero2
from mft.distributed.engine import Engine
from mft.errors import UserError
from tests.distributed.ranks import run_ranks
from tests.distributed.test_engine import OVERFLOWED, Model, micro_batches, overflowed, poisoned, prepared
from tests.loss.modes import config

pytestmark = [pytest.mark.slow, pytest.mark.dist]

RAW = {"zero_optimization": {"round_robin_gradients": True}, "communication_data_type": "bf16"}
BACKENDS: dict[str, tuple[str, dict[str, Any]]] = {
    "ddp": ("ddp", {"find_unused_parameters": True}),
    "zero1": ("zero2", {"stage": 1, "config": RAW}),
    "zero2": ("zero2", {"reduce_bucket_size": 23, "allgather_bucket_size": 42, "overlap_comm": False}),
    "zero3": ("zero3", {"persistence_threshold": 0, "gather_on_save": False}),
    "zero3 sizes": (
        "zero3",
        {
            "reduce_bucket_size": 23,
            "prefetch_bucket_size": 77,
            "persistence_threshold": 7,
            "max_live_parameters": 99,
        },
    ),
    "fsdp": ("fsdp", {}),
    "fsdp kept": ("fsdp", {"reshard": False, "gather_on_save": False}),
    "fsdp every": ("fsdp", {"reduce_every_micro_batch": True}),
}
"""Options of conf/dist with other values than the yaml's."""

SCALED = ("ddp", "fsdp", "fsdp every")
"""Those whose losses torch's scaler scales; DeepSpeed has its own."""

TRAINED = 81
"""Elements of `Model` that are trained, the most that a bucket holds."""

EXCHANGES = ("c10d::allreduce_", "c10d::reduce_", "c10d::_reduce_scatter_base_", "c10d::reduce_scatter_")
"""Collectives in which gradients are added up."""


class Layered(Model):
    """The small model with a unit of sharding."""

    def layer_classes(self) -> list[str]:
        return ["Linear"]


class Misnamed(Model):
    """The small model with a typo in its unit of sharding."""

    def layer_classes(self) -> list[str]:
        return ["Linaer"]


def backend(name: str) -> Any:
    option, values = BACKENDS[name]
    node = config(option, "dist").copy()
    node.update(values)
    return build(node)


def exchanges(engine: Engine, module: Any, number: int) -> int:
    """Returns how many collectives add up something in a step of so many micro-batches on each rank."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        for i, x in enumerate(micro_batches(0)[:number]):
            with engine.accumulating(last=i == number - 1):
                engine.backward(module(x).sum())
        engine.step(1.0)
    return sum(event.name in EXCHANGES for event in profile.events())


def facts(name: str) -> dict[str, Any]:
    """Returns what a live engine is like, after two steps."""
    local_rank = os.environ.pop("LOCAL_RANK")  # as under launch=inline
    engine = backend(name).start("fp32", cpu=True)
    module: Any
    module, optimizer = prepared(engine, kind=Layered)
    os.environ["LOCAL_RANK"] = local_rank
    found: dict[str, Any] = {
        "exchanges": [exchanges(engine, module, number) for number in (1, 3)],
        "gathers": engine.gather_on_save,
    }
    if name == "ddp":
        found["finds"] = module.find_unused_parameters
    if name.startswith("fsdp"):
        from torch.distributed.fsdp import FSDPModule
        from torch.distributed.tensor import DTensor

        found["units"] = sorted(
            type(part).__name__ for part in module.modules() if isinstance(part, FSDPModule)
        )
        module(micro_batches(0)[0])
        found["kept"] = not isinstance(module.hidden.weight, DTensor)
    if name.startswith("zero"):
        found |= {"stage": module.zero_optimization_stage(), "overlap": module.zero_overlap_comm()}
        found |= {"sends": str(module.communication_data_type)}
        found["reduce"] = optimizer.reduce_bucket_size
    if name in ("zero1", "zero2"):
        found |= {
            "allgather": optimizer.allgather_bucket_size,
            "round_robin": optimizer.round_robin_gradients,
        }
    if name.startswith("zero3"):
        found["prefetch"], found["live"] = (
            module.zero_prefetch_bucket_size(),
            module.zero_max_live_parameters(),
        )
        found["whole"] = sorted(n for n, p in engine.model.named_parameters() if p.ds_persist)
    engine.close()
    return found


def halves(name: str) -> dict[str, Any]:
    """Returns the types of parameters, of what is updated and of the gradients that are exchanged under
    bf16."""
    engine = backend(name).start("bf16", cpu=True)
    module, _ = prepared(engine, kind=Layered)
    updated = engine._shards()[0].owner
    found = {"held": str(next(module.parameters()).dtype), "updated": str(updated.dtype)}
    if name.startswith("fsdp"):
        policy = module._get_fsdp_state()._mp_policy
        found |= {"gathered": str(policy.param_dtype), "sent": str(policy.reduce_dtype)}
    engine.close()
    return found


def refused(zero: dict[str, Any], **over: Any) -> str:
    """Returns what is said to a raw DeepSpeed config."""
    with pytest.raises(UserError) as told:
        Zero2(config={"zero_optimization": zero, **over}).start("fp32", cpu=True)
    return str(told.value)


def misnamed() -> str:
    """Returns what is said to a unit of sharding that the model has not."""
    engine = backend("fsdp").start("fp32", cpu=True)
    with pytest.raises(UserError) as told:
        prepared(engine, kind=Misnamed)
    engine.close()
    return str(told.value)


def everything() -> dict[str, Any]:
    names = [name for name in BACKENDS if name not in ("zero3 sizes", "fsdp kept")]
    return {
        "facts": {name: facts(name) for name in BACKENDS},
        "halves": {name: halves(name) for name in ("ddp", "zero2", "zero3", "fsdp")},
        "refused": [
            refused({"round_robin_gradiants": True}),
            refused({"round_robin_gradients": "perhaps"}),
            refused({}, communication_data_type="fp23"),
        ],
        "misnamed": misnamed(),
        "poisoned": {name: poisoned(backend(name), Layered) for name in names},
        "overflowed": {name: overflowed(backend(name), True, Layered) for name in SCALED},
    }


@pytest.fixture(scope="module")
def two() -> list[dict[str, Any]]:
    return run_ranks(2, everything)


@pytest.mark.parametrize("name", BACKENDS)
def test_gradients_are_exchanged_once_a_step_or_in_every_micro_batch(
    two: list[dict[str, Any]], name: str
) -> None:
    for rank in two:
        one, three = rank["facts"][name]["exchanges"]
        if name in ("ddp", "zero1", "fsdp", "fsdp kept"):
            assert one == three > 0
        else:  # whole gradients are on no rank, so each micro-batch's are exchanged
            assert three >= one + 2


def test_settings_reach_ddp_and_fsdp(two: list[dict[str, Any]]) -> None:
    found = two[1]["facts"]
    assert found["ddp"]["finds"] is True
    assert found["fsdp"]["units"] == ["FSDPLayered", "FSDPLinear", "FSDPLinear", "FSDPLinear"]
    assert (found["fsdp"]["kept"], found["fsdp kept"]["kept"]) == (False, True)
    assert (found["fsdp"]["gathers"], found["fsdp kept"]["gathers"]) == (True, False)
    assert (
        "model.shard_layers=['Linaer']" in two[0]["misnamed"] and "did you mean Linear?" in two[0]["misnamed"]
    )


def test_settings_reach_deepspeed(two: list[dict[str, Any]]) -> None:
    found = two[1]["facts"]
    assert [found[name]["stage"] for name in ("zero1", "zero2", "zero3")] == [1, 2, 3]
    assert (found["zero2"]["reduce"], found["zero2"]["allgather"]) == (23, 42)
    assert (found["zero1"]["reduce"], found["zero1"]["allgather"]) == (TRAINED, TRAINED + 1)
    assert (found["zero1"]["round_robin"], found["zero2"]["round_robin"]) == (True, False)
    assert (found["zero1"]["sends"], found["zero2"]["sends"]) == ("torch.bfloat16", "torch.float32")
    assert (found["zero3"]["gathers"], found["zero3 sizes"]["gathers"]) == (False, True)
    sizes = found["zero3 sizes"]
    assert (sizes["reduce"], sizes["prefetch"], sizes["live"]) == (23, 77, 99)
    assert found["zero3"]["reduce"] == TRAINED
    assert found["zero3"]["whole"] == [] and sizes["whole"] == ["head.bias"]
    assert not any(found[name]["overlap"] for name in ("zero1", "zero2", "zero3"))  # a CPU cannot
    zero2 = config("zero2", "dist")
    assert build(zero2).zero(gpu=True)["overlap_comm"] is True
    assert backend("zero2").zero(gpu=True)["overlap_comm"] is False


def test_what_deepspeed_cannot_read_is_told_before_a_model_loads(two: list[dict[str, Any]]) -> None:
    key, value, other = two[0]["refused"]
    assert "round_robin_gradiants: DeepSpeed has no such key; did you mean round_robin_gradients?" in key
    assert value.startswith("dist.config: DeepSpeed does not take it") and "perhaps" in value
    assert "fp23" in other


def test_what_is_trained_is_updated_in_fp32(two: list[dict[str, Any]]) -> None:
    found = two[1]["halves"]
    assert all(found[name]["updated"] == "torch.float32" for name in found)
    assert {name: found[name]["held"].removeprefix("torch.") for name in found} == {
        "ddp": "float32",
        "zero2": "bfloat16",
        "zero3": "bfloat16",
        "fsdp": "float32",
    }
    assert (found["fsdp"]["gathered"], found["fsdp"]["sent"]) == ("torch.bfloat16", "torch.float32")


@pytest.mark.parametrize("name", ["ddp", "zero1", "zero2", "zero3", "fsdp", "fsdp every"])
def test_a_nan_on_one_rank_updates_nothing_on_both(two: list[dict[str, Any]], name: str) -> None:
    for rank in two:
        found = rank["poisoned"][name]
        assert (
            found["norm"] != found["norm"] and found["unchanged"] and found["zeroed"] and not found["skipped"]
        )
    assert two[0]["poisoned"][name]["clean"] == two[1]["poisoned"][name]["clean"] > 0


@pytest.mark.parametrize("name", SCALED)
def test_an_overflow_on_one_rank_is_answered_on_both(two: list[dict[str, Any]], name: str) -> None:
    first, second = (rank["overflowed"][name] for rank in two)
    assert first == OVERFLOWED
    assert second == OVERFLOWED | ({} if name == "ddp" else {"changed": [False] * 3})
