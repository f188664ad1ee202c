"""The model that a config.json describes, on the meta device: settings are checked against it before weights
load.

Building one takes a tenth of a second for a model of any size; the imports before the first take a few
seconds.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from mft.errors import UserError
from mft.model.model_folder import read_config

if TYPE_CHECKING:
    import torch
    from transformers import BitsAndBytesConfig, PreTrainedConfig, PreTrainedModel

    from mft.model.causal_lm import CausalLM

EXPERTS = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")
"""What config.json calls the number of routed experts."""


def on_meta_device(
    family: CausalLM, quantization: BitsAndBytesConfig | None = None
) -> PreTrainedModel | None:
    """Returns the model of a folder on the meta device, its linear layers replaced as quantising would; None
    where the config is not on this machine, or only code of the checkpoint's own could build the model."""
    if family.trust_remote_code or not Path(family.location()).is_dir():
        return None
    try:
        config = family.config()
    except UserError:
        return None  # loading the model reports it
    return skeleton(config, quantization)


def skeleton(
    config: PreTrainedConfig,
    quantization: BitsAndBytesConfig | None = None,
    dtype: torch.dtype | None = None,
) -> PreTrainedModel:
    """Returns the model of a config on the meta device, its linear layers replaced as quantising would.

    dtype: of its other weights, None = the config's.
    """
    import torch
    from transformers import AutoModelForCausalLM
    from transformers.quantizers import AutoHfQuantizer

    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, **({"dtype": dtype} if dtype else {}))
    if quantization:
        quantizer = AutoHfQuantizer.from_config(quantization, pre_quantized=False)
        quantizer.preprocess_model(model, device_map=None, use_kernels=False)
        # which loading sets, and by which peft tells its kinds of adapters
        model.is_loaded_in_4bit = bool(quantization.load_in_4bit)
        model.is_loaded_in_8bit = bool(quantization.load_in_8bit)
    return model


def has_experts(family: CausalLM) -> bool:
    """Whether the config.json of a folder names routed experts; reads nothing else and imports nothing."""

    def named(values: dict[str, Any]) -> bool:
        # text_config of one that also sees
        parts = [value for value in values.values() if isinstance(value, dict)]
        return any((values.get(key) or 0) > 1 for key in EXPERTS) or any(map(named, parts))

    return named(read_config(Path(family.location())))
