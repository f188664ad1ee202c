"""What engines hold and exchange, by hand: 1,000 trained weights in two layers, 200 in none, 2 ranks."""

from __future__ import annotations

import pytest

from mft.distributed.ddp import Ddp, Single
from mft.distributed.deepspeed import Zero2, Zero3
from mft.distributed.engine import Backend
from mft.distributed.fsdp import Fsdp
from mft.estimate.engines import during, held, loading
from mft.estimate.sizes import Model, Unit

MODEL = Model([Unit(400, 0, 0, 300, 40), Unit(400, 0, 0, 300, 40)], Unit(200, 60, 0, 200, 20))
"""1,000 trained weights; of the layers 80 bytes are in weights that ZeRO-3 keeps whole, of the rest 20."""


@pytest.mark.parametrize(
    ("dist", "half", "expected"),
    [
        (Single(), True, {"weights": 4000, "optimizer": 8000}),  # gradients come and go
        (Ddp(), True, {"weights": 4000, "gradients": 4000, "optimizer": 8000}),
        # the copy in float32 that is updated is half a rank's, 2,000 bytes, in any precision
        (Zero2(), True, {"weights": 2000, "optimizer": 2000 + 4000}),
        (Zero2(), False, {"weights": 4000, "optimizer": 2000 + 4000}),
        (Zero3(), True, {"weights": 1000 + 100, "gradients": 1000, "optimizer": 6000, "buckets": 2000}),
        (Zero3(), False, {"weights": 2000 + 100, "gradients": 2000, "optimizer": 6000, "buckets": 4000}),
        (Fsdp(), True, {"weights": 2000, "optimizer": 4000}),
    ],
)
def test_what_is_held_throughout(dist: Backend, half: bool, expected: dict[str, float]) -> None:
    parts = held(MODEL, dist, 2, half, states=8, gpu=True, accumulates=False).device
    frozen = 30 if "weights" in dist.divided_parts() else 60
    assert {name: size for name, size in parts.items() if size} == expected | {"frozen": frozen}


def gradients(dist: Backend) -> list[float]:
    """Returns the bytes of gradients at the turn, in the backward pass of both layers and while they are
    exchanged, of a step with several micro-batches."""
    always = held(MODEL, dist, 2, False, states=8, gpu=True, accumulates=True).device.get("gradients", 0.0)
    phases = (("turn", -1), ("backward", 1), ("backward", 0), ("exchange", -1))
    of = [during(MODEL, dist, 2, False, name, layer, True, True) for name, layer in phases]
    return [always + parts.get("gradients", 0.0) for parts in of]


@pytest.mark.parametrize(
    ("dist", "expected"),
    [
        (Single(), [4000, 4000, 4000, 4000]),
        (Ddp(), [8000, 8000, 6400, 4000]),  # moved into the buckets layer by layer
        (Zero2(), [2000, 2000, 2000, 4000]),  # those of the last one beside the sum
        (Zero3(), [2000, 2000, 2000, 2000]),
        (Fsdp(), [4000, 4000, 2400 + 800, 2000]),  # sent layer by layer
        (Fsdp(reduce_every_micro_batch=True), [2000, 2000, 2000, 2000]),
        (Fsdp(offload=True), [4000, 4000, 2400, 0]),
        (Fsdp(offload=True, reduce_every_micro_batch=True), [0, 0, 0, 0]),
    ],
)
def test_gradients_of_several_micro_batches(dist: Backend, expected: list[float]) -> None:
    assert gradients(dist) == expected


@pytest.mark.parametrize(
    ("reshard", "expected"), [(True, [3200, 1600, 3200, 1600]), (False, [3200] * 3 + [1600])]
)
def test_layers_that_fsdp_has_gathered(reshard: bool, expected: list[float]) -> None:
    phases = (("forward", 0), ("turn", -1), ("backward", 1), ("backward", 0))
    of = [
        during(MODEL, Fsdp(reshard=reshard), 2, False, name, n, False, True)["gathers"] for name, n in phases
    ]
    assert of == [
        pytest.approx(860 + layers) for layers in expected
    ]  # what is in none, and of 1,600 bytes each


def test_what_deepspeed_offloads() -> None:
    """In bf16, of 1,000 weights and 2 ranks; the largest matrix has 300."""
    two, three = (
        held(MODEL, dist(offload_optimizer=True), 2, True, 8, True, False) for dist in (Zero2, Zero3)
    )
    # what is updated goes back through a buffer, and a gradient out through one on either side
    assert two.host == {"optimizer": 6000, "gradients": 2000, "weights": 1000, "buckets": 600}
    assert two.device["buckets"] == 600 and "gradients" not in two.device
    assert three.host == {"optimizer": 6000, "gradients": 2000 + 1000}
    assert "gradients" not in three.device and "optimizer" not in three.device


def test_one_rank_of_zero3_gathers_nothing() -> None:
    assert held(MODEL, Zero3(), 1, True, 8, True, False).device["weights"] == 2000
    assert not during(MODEL, Zero3(), 1, True, "turn", -1, False, True)["gathers"]


@pytest.mark.parametrize("stage", [1, 2])
def test_zero_keeps_gradients_as_they_arrive_bucket_by_bucket(stage: int) -> None:
    """Stage 1 adds all of them up in place, stage 2 keeps the part of one of two ranks."""
    dist = Zero2(stage=stage, reduce_bucket_size=100)
    phases = (("turn", -1), ("backward", 1), ("backward", 0), ("exchange", -1))
    of = [
        during(MODEL, dist, 2, True, name, layer, False, True).get("gradients", 0.0) for name, layer in phases
    ]
    assert of == [2 * arrived / stage for arrived in (0, 200, 600, 1000)]
    assert "gradients" not in held(MODEL, dist, 2, True, 8, True, False).device


@pytest.mark.parametrize(
    ("dist", "expected"),
    [
        (Single(), 4060),
        (Zero2(), 4060 + 2000 + 2000),
        (Zero2(offload_optimizer=True), 4060 + 2000),  # what is updated is made on the host
        (Zero3(), 2030 + 1600),
        (Zero3(offload_optimizer=True, offload_parameters=True), 1600),  # one layer at a time
        (Fsdp(), 2030 + 1600),
        (Fsdp(offload=True), 1600),
    ],
)
def test_the_device_holds_while_loading_what_stays_there(dist: Backend, expected: float) -> None:
    always = held(MODEL, dist, 2, True, states=8, gpu=True, accumulates=False)
    assert loading(MODEL, dist, 2, True, always) == expected
