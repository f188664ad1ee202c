"""Loading from a folder or the hub: transformers' errors as sentences, and loaded weights checked."""

from __future__ import annotations

import importlib
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mft.errors import UserError
from mft.model.model_folder import read_config
from mft.model.quantised_checkpoint import WeightFormat, cast_unquantised, loading_config, weight_format
from mft.model.transformers_private import fetched, forget_dequantisation
from mft.model.weights import check_loaded

if TYPE_CHECKING:
    import torch
    from transformers import BitsAndBytesConfig, PreTrainedConfig, PreTrainedModel


@dataclass(frozen=True)
class Pretrained:
    """What from_pretrained is given."""

    path: str
    """model.path as the user wrote it, for messages."""

    source: str
    """An absolute folder, or a hub name."""

    revision: str | None
    """Branch, tag or commit of a hub name; None = main."""

    trust_remote_code: bool
    """Whether code that comes with the checkpoint may run."""

    def read(self, factory: Any, **arguments: Any) -> Any:
        """Returns factory.from_pretrained(…); UserError for what a person got wrong."""
        from huggingface_hub.errors import StrictDataclassError

        if str(read_config(Path(self.source)).get("model_type")).startswith("mft_"):
            importlib.import_module("mft.model.legacy.native")  # registers the classes it was saved with
        arguments |= {"revision": self.revision, "trust_remote_code": self.trust_remote_code}
        try:
            return factory.from_pretrained(self.source, **arguments)
        except (OSError, ValueError) as error:
            # These two are what transformers raises for a wrong name, no network, a licence, no safetensors.
            reason = " ".join(str(error).split())
            if "couldn't connect" in reason:
                reason = "no such folder, the hub cannot be reached, and its files were never fetched before"
            raise UserError(f"model.path={self.path} cannot be loaded: {reason}") from error
        except StrictDataclassError as error:  # a value of config.json
            reason = str(error).splitlines()[-1].strip()
            raise UserError(f"model.path={self.path}: config.json: {reason}") from error


def load_model(
    pretrained: Pretrained,
    weights: WeightFormat,
    config: PreTrainedConfig | None,
    dtype: torch.dtype,
    quantization: BitsAndBytesConfig | None,
    attention: str | None,
    dequantise: bool,
    device: torch.device | None = None,
) -> PreTrainedModel:
    """Returns a causal LM, every weight of which came from the checkpoint and fits its config.

    weights: how it is stored; config: its config, read only where it is quantised; attention: the
    implementation, None = transformers' choice; dequantise: turn a quantised checkpoint into real values;
    device: where the weights are put as they are read, None = where transformers does.
    """
    from transformers import AutoModelForCausalLM

    from mft.model.legacy.native import restore_norm_head

    arguments: dict[str, Any] = {"device_map": {"": device}} if device else {}
    if config is not None:
        computing = getattr(quantization, "bnb_4bit_compute_dtype", None)
        arguments["config"] = loading_config(config, weights, computing)
    elif quantization:  # passed as None it would discard the checkpoint's own
        arguments["quantization_config"] = quantization
    model, info = pretrained.read(
        AutoModelForCausalLM,
        output_loading_info=True,
        dtype=dtype,
        attn_implementation=attention,
        use_safetensors=True,
        ignore_mismatched_sizes=True,  # they are refused here, by name
        **arguments,
    )
    check_loaded(Path(pretrained.source), model, info)
    if not Path(pretrained.source).is_dir():
        # The headers of a hub name's files can be judged only now that they were fetched.
        file = fetched(pretrained.source, "config.json", pretrained.revision, local_only=True)
        if file:
            weight_format(f"model.path={pretrained.path}", read_config(file.parent), file.parent)
    # bitsandbytes loads packed and unpacks afterwards; the other methods were dequantised while loading.
    if dequantise:
        model = model.dequantize(dtype) if weights.bits else model
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
