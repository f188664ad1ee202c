"""What is used of DeepSpeed and accelerate without being public is there; it fails by its name where it is gone."""

from __future__ import annotations

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
