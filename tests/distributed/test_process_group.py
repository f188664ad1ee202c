"""Which GPU a rank takes. None is here: what a rank sees is given, and its number stands for the GPU."""

from __future__ import annotations

import os

import pytest

from mft.distributed import process_group
from tests.distributed.ranks import run_ranks
from tests.distributed.test_engines import backend

BACKENDS = ("ddp", "zero3")


def numbers(visible: int) -> dict[str, tuple[int, str]]:
    """Returns the number of its GPU that accelerate gives to DDP, and DeepSpeed's, by backend."""
    process_group.visible_gpus = lambda: visible
    own, found = os.environ["LOCAL_RANK"], {}
    for name in BACKENDS:
        engine = backend(name).start("fp32")
        found[name] = (engine.accelerator.local_process_index, os.environ["LOCAL_RANK"])
        engine.close()
        os.environ["LOCAL_RANK"] = own
    return found


@pytest.mark.slow
@pytest.mark.dist
def test_a_rank_that_sees_one_gpu_takes_it() -> None:
    """As under srun --gpus-per-task=1: the number of the rank among those of its machine would be another."""
    assert run_ranks(2, numbers, 1) == [dict.fromkeys(BACKENDS, (0, "0"))] * 2
    assert run_ranks(2, numbers, 2) == [dict.fromkeys(BACKENDS, (n, str(n))) for n in (0, 1)]
