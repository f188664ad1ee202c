"""Non-public parts of transformers that mft uses, as of 5.23.0.

Everything with a leading underscore, and modules that its documentation does not name, is used here alone. A
release that changes one of them fails in tests/model/test_transformers_private.py, which says which.
"""

from __future__ import annotations

import importlib.util
import re
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel

READ_IN = "5.23.0"
"""The version in which this was read."""


# ── a class, or a loaded model ──


def model_class(config: PreTrainedConfig) -> Any:
    """Returns the class that AutoModelForCausalLM has for a config, None for a config of remote code."""
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM._model_mapping.get(type(config), None)


def flash_kernels(cls: type) -> tuple[bool, list[str] | None]:
    """Returns whether a class supports flash attention, and in which implementations only (None: in any)."""
    only = getattr(cls, "_compatible_flash_implementations", None)
    return getattr(cls, "_supports_flash_attn", False), only


def attention_name(base: PreTrainedModel) -> str:
    """Returns the name by which the attention of a loaded model is registered."""
    return getattr(base.config, "_attn_implementation", None) or ""


def attends_by_registry(base: PreTrainedModel) -> bool:
    """Whether the layers of a model call the attention that is registered, rather than their own code."""
    return bool(base._supports_attention_backend)


def is_stateful(base: PreTrainedModel) -> bool:
    """Whether a model carries a state from token to token."""
    return bool(base._is_stateful)


def unsplit_layers(base: PreTrainedModel) -> list[str]:
    """Returns the class names of the layers that are not to be divided over devices: the decoder layers."""
    return sorted(base._no_split_modules or [])


def recorded_outputs(decoder: Any) -> Any:
    """Returns the names of what a decoder can hand out beside its hidden states."""
    return getattr(decoder, "_can_record_outputs", None) or {}


def kept_in_float32(model: PreTrainedModel) -> list[str]:
    """Returns parts of the names of weights that stay in float32 in a model of any dtype."""
    return [*(model._keep_in_fp32_modules or ()), *(model._keep_in_fp32_modules_strict or ())]


@contextmanager
def experts_multiplied_by(product: Callable[..., Any]) -> Iterator[None]:
    """Context in which routed experts are multiplied by product(rows, weights, offs=where each expert ends)."""
    from transformers.integrations import moe

    found = moe._grouped_mm
    moe._grouped_mm = product
    try:
        yield
    finally:
        moe._grouped_mm = found


# ── loading and saving ──


def fetched(name: str, file: str, revision: str | None, local_only: bool = False) -> Path | None:
    """Returns a file of a folder, or of a hub name (fetched unless local_only); None if absent."""
    from transformers.utils import cached_file

    quiet = {"_raise_exceptions_for_missing_entries": False}
    path = cached_file(name, file, revision=revision, local_files_only=local_only, **quiet)
    return Path(path) if path else None


def known_model_type(kind: str) -> bool:
    """Whether transformers has a model type, by a look at its files, without importing it."""
    spec = importlib.util.find_spec("transformers")
    roots = (spec.submodule_search_locations or []) if spec else []
    return any((Path(root) / "models" / kind.replace("-", "_")).is_dir() for root in roots)


def model_types() -> Iterable[str]:
    """Returns the model types of transformers."""
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES

    return CONFIG_MAPPING_NAMES


def zero3_is_on() -> bool:
    """Whether models are divided by ZeRO-3 while they are loaded."""
    from transformers.integrations.deepspeed import is_deepspeed_zero3_enabled

    return bool(is_deepspeed_zero3_enabled())


def leftover_weights(model: PreTrainedModel, stored: Iterable[str]) -> set[str]:
    """Returns the native names of those stored weights that a model neither takes nor leaves out on
    purpose."""
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key

    steps, state = get_model_conversion_mapping(model), model.state_dict()
    renamings = [step for step in steps if isinstance(step, WeightRenaming)]
    converters = [step for step in steps if isinstance(step, WeightConverter)]
    native = {rename_source_key(n, renamings, converters, model.base_model_prefix, state)[0] for n in stored}
    ignored = model._keys_to_ignore_on_load_unexpected or ()
    return {n for n in native - state.keys() if not any(re.search(pattern, n) for pattern in ignored)}


def forget_dequantisation(model: Any) -> None:
    """Makes a model save its weights as they are in memory: transformers would quantise them again, and name
    no quantisation in the config.json beside them."""
    from transformers.conversion_mapping import get_model_conversion_mapping

    used = {tuple(step._original_target_patterns) for step in model._weight_conversions or ()}
    plain = get_model_conversion_mapping(model)
    model._weight_conversions = [step for step in plain if tuple(step._original_target_patterns) in used]
