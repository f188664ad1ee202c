"""Loading from a folder or the hub: transformers' errors as sentences, and the weights checked as they
came."""

from __future__ import annotations

import importlib
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mft.errors import UserError
from mft.model.model_folder import read_config
from mft.model.quantised_checkpoint import (
    WeightFormat,
    cast_unquantised,
    loading_config,
    weight_format,
)
from mft.model.transformers_private import fetched, forget_dequantisation
from mft.model.weights import check_loaded

if TYPE_CHECKING:
    import torch
    from transformers import BitsAndBytesConfig


@dataclass(frozen=True)
class Pretrained:
    """What from_pretrained is given."""

    path: str
    """model.path as the user wrote it, for messages."""

    source: str
    """An absolute folder, or a hub name."""

    revision: str | None
    trust_remote_code: bool

    def read(self, factory: Any, **arguments: Any) -> Any:
        """Returns factory.from_pretrained(…); UserError for what a person got wrong."""
        from huggingface_hub.errors import StrictDataclassError

        if str(read_config(Path(self.source)).get("model_type")).startswith(
            "mft_"
        ):  # saved with a class of ours
            importlib.import_module("mft.model.legacy.native")
        try:
            return factory.from_pretrained(
                self.source, revision=self.revision, trust_remote_code=self.trust_remote_code, **arguments
            )
        except (OSError, ValueError) as error:
            # transformers reports what a person got wrong (name, network, licence, no safetensors) as these
            # two.
            reason = " ".join(str(error).split())
            if "couldn't connect" in reason:
                reason = "there is no such folder, the hub cannot be reached, and its files were never fetched before"
            raise UserError(f"model.path={self.path} cannot be loaded: {reason}") from error
        except StrictDataclassError as error:  # a value of config.json
            raise UserError(
                f"model.path={self.path}: config.json: {str(error).splitlines()[-1].strip()}"
            ) from error

    def fetched(self) -> Path | None:
        """Returns where the files of a hub name lie once it was loaded, None for a folder."""
        if Path(self.source).is_dir():
            return None
        file = fetched(self.source, "config.json", self.revision, local_only=True)
        return file.parent if file else None


def load_model(
    pretrained: Pretrained,
    weights: WeightFormat,
    config: Any,
    dtype: torch.dtype,
    quantization: BitsAndBytesConfig | None,
    attention: str | None,
    device_map: Any = None,
    dequantise: bool = False,
) -> Any:
    """Returns a causal LM, every weight of which came from the checkpoint and fits its config.

    weights: how it is stored; config: its config, read only where it is quantised; attention: the
    implementation, None = transformers' choice; dequantise: turn a quantised checkpoint into the values that
    its numbers stand for.
    """
    from transformers import AutoModelForCausalLM

    from mft.model.legacy.native import restore_norm_head

    arguments: dict[str, Any] = {}
    if weights.method:
        computing = getattr(quantization, "bnb_4bit_compute_dtype", None)
        arguments["config"] = loading_config(config, weights, computing)
    elif quantization:  # None would take the checkpoint's own away
        arguments["quantization_config"] = quantization
    model, info = pretrained.read(
        AutoModelForCausalLM,
        output_loading_info=True,
        dtype=dtype,
        device_map=device_map,
        attn_implementation=attention,
        use_safetensors=True,
        ignore_mismatched_sizes=True,  # they are refused here, by name
        **arguments,
    )
    check_loaded(Path(pretrained.source), model, info)
    if folder := pretrained.fetched():
        weight_format(f"model.path={pretrained.path}", read_config(folder), folder)
    if weights.bits and dequantise:
        model = model.dequantize(dtype)
    if dequantise:
        cast_unquantised(model, dtype)
    if weights.method:
        forget_dequantisation(model)
    restore_norm_head(model)
    # On CPUs with AVX512-BF16 bitsandbytes repacks 4-bit weights in place at the first evaluation, after
    # which training gradients are wrong (relative error 0.73) while the loss looks right. from_pretrained
    # returns eval mode.
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False
    return model
