"""Non-public parts of peft that mft uses, as of 0.21.2.

A release that changes one of these fails in tests/model/test_peft_private.py, which says which.
"""

from __future__ import annotations

from typing import Any

READ_IN = "0.21.2"
"""The version in which this was read."""


def turns_into_experts(base: Any, name: str) -> bool:
    """Whether peft takes the name of a linear layer for a fused weight of routed experts on this kind of
    model.

    It does so to load adapters made before transformers 5, also where linear layers have the same names:
    deepseek's shared experts and dense layers.
    """
    from peft import LoraConfig
    from peft.utils.transformers_weight_conversion import convert_peft_config_for_transformers

    config = LoraConfig(target_modules=[name])
    try:
        convert_peft_config_for_transformers(config, base, None)
    except ValueError:  # half of a fused pair
        return True
    return name not in (config.target_modules or ())


def new_rows(head: Any) -> tuple[Any, list[int], Any] | None:
    """Returns (plain layer, new rows, their weights) of an output layer with trained rows, None for any
    other."""
    adapter = getattr(head, "token_adapter", None)
    if adapter is None or adapter.disable_adapters or adapter.merged:
        return None
    ((name, rows),) = adapter.token_indices.items()
    return adapter.base_layer, rows, adapter.trainable_tokens_delta[name]
