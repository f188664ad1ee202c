"""What mft/model/transformers_private.py reads is there, and means what it meant in the version it was read
in."""

from __future__ import annotations

import inspect
from pathlib import Path

import pytest
import torch
import transformers

from mft.model import transformers_private as private
from mft.model.tiny import Tiny

GONE = f"in transformers {transformers.__version__}: see mft/model/transformers_private.py, read in {private.READ_IN}"
ATTRIBUTES = (
    *(
        "_supports_flash_attn",
        "_compatible_flash_implementations",
        "_supports_attention_backend",
        "_is_stateful",
    ),
    *("_no_split_modules", "_keep_in_fp32_modules", "_keep_in_fp32_modules_strict"),
    *("_keys_to_ignore_on_load_unexpected", "_check_and_adjust_attn_implementation"),
)


@pytest.mark.parametrize("name", ATTRIBUTES)
def test_attributes_of_a_model_class(name: str) -> None:
    assert hasattr(transformers.PreTrainedModel, name), f"PreTrainedModel.{name} is gone {GONE}"


def test_functions() -> None:
    from transformers import conversion_mapping, core_model_loading
    from transformers.integrations import deepspeed, moe, sdpa_attention
    from transformers.models.auto import configuration_auto
    from transformers.models.mixtral import modeling_mixtral

    for module, name in (
        (conversion_mapping, "get_model_conversion_mapping"),
        (core_model_loading, "WeightConverter"),
        (core_model_loading, "WeightRenaming"),
        (core_model_loading, "rename_source_key"),
        (deepspeed, "is_deepspeed_zero3_enabled"),
        (sdpa_attention, "sdpa_attention_forward"),
        (sdpa_attention, "repeat_kv"),
        (moe, "_grouped_mm"),
        (transformers.masking_utils, "sdpa_mask"),
        (transformers.masking_utils, "eager_mask"),
        (configuration_auto, "CONFIG_MAPPING_NAMES"),
        (modeling_mixtral, "load_balancing_loss_func"),
    ):
        assert hasattr(module, name), f"{module.__name__}.{name} is gone {GONE}"


def test_what_they_say_of_a_llama(tiny: Tiny) -> None:
    model = tiny.model(torch.float32)
    assert private.model_class(model.config) is transformers.LlamaForCausalLM, GONE
    assert private.attention_name(model) == "sdpa" and private.attends_by_registry(model), GONE
    assert not private.is_stateful(model) and private.flash_kernels(type(model))[0], GONE
    assert private.unsplit_layers(model) == ["LlamaDecoderLayer"] and private.kept_in_float32(model) == [], (
        GONE
    )
    assert (
        private.known_model_type("llama") and "llama" in private.model_types() and not private.zero3_is_on()
    ), GONE
    assert "hidden_states" in private.recorded_outputs(model.model), GONE
    names = [*model.state_dict(), "model.layers.9.mlp.up_proj.weight"]
    assert private.leftover_weights(model, names) == {"model.layers.9.mlp.up_proj.weight"}, GONE
    assert hasattr(model, "_weight_conversions"), f"PreTrainedModel._weight_conversions is gone {GONE}"


def test_steps_of_a_conversion_know_their_targets() -> None:
    from transformers.core_model_loading import WeightRenaming

    assert hasattr(WeightRenaming("a", "b"), "_original_target_patterns"), GONE


def test_files_that_are_not_there_are_none(tiny_folder: Path) -> None:
    assert private.fetched(str(tiny_folder), "config.json", None) == tiny_folder / "config.json"
    assert private.fetched(str(tiny_folder), "nothing.json", None) is None
    accepted = inspect.signature(transformers.utils.hub.cached_files).parameters
    assert "_raise_exceptions_for_missing_entries" in accepted, GONE
