"""What is used of DeepSpeed, accelerate and torch beside their public interfaces is there; a failure names it."""

from __future__ import annotations

import importlib
import inspect

import pytest


def test_deepspeed_has_what_the_resume_state_is_read_from() -> None:
    deepspeed = pytest.importorskip("deepspeed")
    from deepspeed.runtime.zero.stage3 import DeepSpeedZeroOptimizer_Stage3
    from deepspeed.runtime.zero.stage_1_and_2 import DeepSpeedZeroOptimizer

    assert hasattr(deepspeed.zero, "register_external_parameter") and hasattr(
        deepspeed.zero, "GatheredParameters"
    )
    assert hasattr(DeepSpeedZeroOptimizer, "update_lp_params")
    for name in (
        "get_param_id",
        "checkpoint_event_prologue",
        "checkpoint_event_epilogue",
        "_reassign_or_swap_out_partitioned_parameters",
    ):
        assert hasattr(DeepSpeedZeroOptimizer_Stage3, name), name
    source = inspect.getsource(DeepSpeedZeroOptimizer_Stage3)
    for name in ("grad_position", "fp32_partitioned_groups_flat", "fp16_groups"):
        assert f"self.{name}" in source, name
    assert "_hp_mapping" in inspect.getsource(inspect.getmodule(DeepSpeedZeroOptimizer))


def test_accelerate_can_be_started_anew_in_one_process() -> None:
    from accelerate.state import AcceleratorState, GradientState

    assert "reset_partial_state" in inspect.signature(AcceleratorState._reset_state).parameters
    assert callable(GradientState._reset_state)


def test_torch_has_timeouts_that_can_be_changed() -> None:
    from datetime import timedelta

    from torch.distributed import distributed_c10d

    assert callable(distributed_c10d._set_pg_timeout) and isinstance(distributed_c10d._world.pg_map, dict)
    source = inspect.getsource(distributed_c10d._get_default_timeout)
    assert "default_pg_timeout" in source and "default_pg_nccl_timeout" in source
    assert isinstance(distributed_c10d.default_pg_timeout, timedelta)


def test_deepspeed_compiles_nothing_that_it_does_not_find_compatible() -> None:
    pytest.importorskip("deepspeed")
    source = inspect.getsource(importlib.import_module("deepspeed.comm.torch").build_shm_op)
    assert "__compatible_ops__.get(builder.NAME, False)" in source


def test_fsdp2_decides_what_it_casts_where_it_is_asked() -> None:
    from torch.distributed.fsdp._fully_shard._fsdp_param import FSDPParam

    assert "self.param_dtype = " in inspect.getsource(FSDPParam.init_dtype_attrs)
