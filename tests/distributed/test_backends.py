"""Whole runs of every backend on two ranks against one process: losses, gradient norms, weights."""

from __future__ import annotations

import pytest

from mft.config.build import component
from mft.config.compose import compose_resolved
from mft.distributed.deepspeed import Zero2, Zero3
from mft.errors import UserError
from tests.distributed.equality import MATRIX, differences, play_beside_single
from tests.distributed.runs import BACKENDS, LAYOUTS, Tree, logged
from tests.selection import long, selected

OTHER = {
    "adaptive": ("peft=full", "loss=famo", *LAYOUTS["pack"]),
    "checkpointing": ("peft=qlora", "model.gradient_checkpointing=true", *LAYOUTS["pad"]),
    "checkpointing_full": (
        "peft=full",
        "model.tied=false",
        "model.gradient_checkpointing=true",
        *LAYOUTS["pack"],
    ),
    "checkpointing_lora": ("peft=lora", "model.gradient_checkpointing=true", *LAYOUTS["pack"]),
}
"""Further runs of each backend: a loss mode that runs the micro-batches without gradient too, and so on."""

QUICK = {
    "full-pack": BACKENDS,
    "lora-pad": ("fsdp",),
    "qlora-pack": ("zero3",),
    "adaptive": ("zero2",),
    "checkpointing": ("zero3",),
}
"""Each peft mode, each layout, a loss without gradient and checkpointing, on a backend that divides the weights or
states; in `make check-all` every case on every backend."""

STEPS = {case: 8 if case in QUICK else 20 for case in MATRIX} | dict.fromkeys(OTHER, 4)
CASES = {
    case: (*overrides, f"train.max_steps={STEPS[case]}", f"train.eval_every={max(4, STEPS[case] // 2)}")
    for case, overrides in (MATRIX | OTHER).items()
}
"""Overrides of each case; twenty steps in `make check-all` alone."""


@pytest.fixture(scope="module")
def tree(tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest) -> Tree:
    tree, pairs = Tree(tmp_path_factory.mktemp("backends")), selected(request, "backend", "case")
    backends = {case: [b for b in BACKENDS if (b, case) in pairs] for case in CASES}
    play_beside_single(tree, {case: CASES[case] for case in CASES if backends[case]}, backends)
    return tree


@pytest.mark.slow
@pytest.mark.dist
@pytest.mark.parametrize(
    ("backend", "case"),
    [
        (backend, case) if backend in QUICK.get(case, ()) else long(backend, case)
        for backend in BACKENDS
        for case in CASES
    ],
)
def test_two_ranks_of_any_backend_do_what_one_process_does(tree: Tree, backend: str, case: str) -> None:
    one, two = tree.folder("single", case), tree.folder(backend, case)
    assert len(logged(two, "train/loss")) == STEPS[case]
    assert max(logged(one, "grad_norm")) > 0.5  # clipping took place
    found = differences(one, two)
    assert max(found.values()) < 1e-5, found


def test_raw_config_is_merged_over_ours_and_may_not_say_what_a_setting_says() -> None:
    raw = {
        "zero_optimization": {"offload_optimizer": {"pin_memory": True}},
        "communication_data_type": "fp32",
    }
    zero2 = Zero2(offload_optimizer=True, config=raw)
    merged = zero2._merged_over(
        {"train_micro_batch_size_per_gpu": 1, "zero_optimization": zero2.zero(gpu=False)}
    )
    offloaded = {"offload_optimizer": {"device": "cpu", "pin_memory": True}}
    assert merged["zero_optimization"] == zero2.zero(gpu=False) | offloaded
    assert merged["communication_data_type"] == "fp32"
    one = compose_resolved(["dist=zero2", "dist.config={zero_optimization: {round_robin_gradients: true}}"])
    other = compose_resolved(["dist=zero3", "+dist.config.zero_optimization.zero_hpz_partition_size=8"])
    assert component(one, "dist").config == {"zero_optimization": {"round_robin_gradients": True}}
    assert component(other, "dist").config == {"zero_optimization": {"zero_hpz_partition_size": 8}}
    with pytest.raises(
        UserError, match=r"dist\.config\.gradient_clipping is decided by train\.max_grad_norm"
    ):
        Zero2(config={"gradient_clipping": 1.0}).check()
    with pytest.raises(UserError, match=r"zero_optimization\.stage is decided by dist"):
        Zero3(config={"zero_optimization": {"stage": 1}}).check()
    with pytest.raises(UserError, match=r"reduce_bucket_size is decided by dist\.reduce_bucket_size"):
        Zero2(config={"zero_optimization": {"reduce_bucket_size": 1}}).check()
    with pytest.raises(UserError, match=r"dist\.allgather_bucket_size=7: .* even"):
        Zero2(allgather_bucket_size=7).check()
    with pytest.raises(UserError, match=r"stage 3 is dist=zero3"):
        Zero2(stage=3).check()
