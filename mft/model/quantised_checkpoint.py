"""How the weights of a checkpoint are stored: plain; by bitsandbytes, which peft=qlora trains beside as they
are; in another way that `mft convert` turns into real values; or in one that cannot be read.

A quantised weight read by its numbers alone is another weight, thousands of times too large. config.json and
the headers of the weight files tell them apart within milliseconds, before anything is loaded.
"""

from __future__ import annotations

import importlib.util
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mft.errors import UserError, shortened
from mft.model.quantised_tensors import BNB, UNREADABLE, WAY_OUT, Settings, check_tensors
from mft.model.safetensors_header import stored_tensors
from mft.model.transformers_private import kept_in_float32

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedConfig, PreTrainedModel

FORMATS = ("float-quantized", "int-quantized", "pack-quantized")
"""Formats of compressed-tensors that are read."""


@dataclass(frozen=True)
class WeightFormat:
    """How the weights of a checkpoint are stored."""

    method: str = ""
    """quant_method of its config.json, "" for plain weights."""

    settings: Settings = field(default_factory=dict)
    """All that config.json says about the quantisation."""

    @property
    def bits(self) -> int:
        """Bits of a weight of bitsandbytes, 0 for any other method."""
        return 0 if self.method != BNB else 4 if self.settings.get("load_in_4bit") else 8


def weight_format(who: str, config: Settings, folder: Path | None) -> WeightFormat:
    """Returns how the weights of a checkpoint are stored.

    who: begins a sentence about it, e.g. model.path=x; config: its config.json; folder: where its weight
    files lie, None as long as they are not on this machine.

    Raises UserError, with the way out, for a method that is not read, for weights that are not what
    config.json says, and for an adapter's weights among the base's.
    """
    stored = _config_format(who, config)
    if reason := _unreadable(stored):
        raise UserError(f"{who}: its weights are quantised by {stored.method}{reason} {WAY_OUT}")
    if folder is not None:
        headers = {name: tensor for name, (_, tensor) in stored_tensors(folder).items()}
        check_tensors(who, stored.method, stored.settings, headers, folder)
    return stored


def _config_format(who: str, config: Settings) -> WeightFormat:
    """Returns what config.json says; UserError where it says so in a place that transformers does not look
    at."""
    place, settings = next(_settings(config), ("", {}))
    if not place:
        return WeightFormat()
    if not isinstance(settings, Mapping):
        raise UserError(f"{who}: {place} in its config.json must be an object")
    of_bnb = settings.get("load_in_4bit") or settings.get("load_in_8bit")
    method = BNB if of_bnb else settings.get("quant_method")
    if not method or (method == BNB and not of_bnb):
        raise UserError(f"{who}: {place} in its config.json does not name a quantisation method; {WAY_OUT}")
    if not isinstance(method, str) or not re.fullmatch(r"[\w.+-]{1,40}", method):
        method = shortened(method)  # it may be any value, and is going to be printed
    if place not in ("quantization_config", "text_config.quantization_config"):
        raise UserError(
            f"{who}: its weights are quantised by {method}, as {place} in its config.json says, where "
            f"transformers does not look for it; {WAY_OUT}"
        )
    return WeightFormat(method, settings)


def _settings(values: Mapping[str, Any], path: str = "") -> Iterator[tuple[str, Any]]:
    """Yields what a config.json says about quantisation and where, from the outside to the parts of the
    model."""
    keys = ("quantization_config", "compression_config")
    yield from ((path + key, values[key]) for key in keys if values.get(key) is not None)
    for key, value in values.items():
        if key not in keys and isinstance(value, Mapping):
            yield from _settings(value, f"{path}{key}.")


def _unreadable(stored: WeightFormat) -> str:
    """Returns why weights of a method cannot be read, by what config.json says alone; "" where they can.

    It ends so that the way out can follow.
    """
    settings = stored.settings
    if stored.method and stored.method not in UNREADABLE:
        return ", as config.json says, which cannot be read here;"
    if settings.get("modules_to_convert"):
        return ", with embeddings in fp8 (modules_to_convert in its config.json), which cannot be trained;"
    if stored.method != "compressed-tensors":
        return ""
    if importlib.util.find_spec("compressed_tensors") is None:
        return ", which needs the package of that name: pip install compressed-tensors, or"
    groups, sparsity = settings.get("config_groups") or {}, settings.get("sparsity_config") or {}
    if settings.get("format") not in FORMATS:
        problem = f"of the format {settings.get('format')}"
    elif len(groups) != 1:  # transformers reads all dense layers by the first
        problem = f"in {len(groups)} groups"
    elif sparsity and sparsity.get("format") != "dense":
        problem = f"with sparsity {sparsity}"
    else:
        return ""
    allowed = f"one group of the format {', '.join(FORMATS)}, without sparsity"
    return f" {problem}, which cannot be read here (allowed: {allowed});"


def refuse_quantised(path: str, weights: WeightFormat, bits: int) -> None:
    """Raises UserError for a checkpoint that cannot be trained as it is stored: quantised, unless by
    bitsandbytes to the bits that peft=qlora asks for; bits: those, 0 for a base that is not to be
    quantised."""
    if not weights.method or (weights.bits and weights.bits == bits):
        return
    how, choice = f"by {weights.method}", ""
    if weights.bits:
        how += f" to {weights.bits} bits" + (f", not to peft.bits={bits}" if bits else "")
        choice = f"choose peft=qlora with peft.bits={weights.bits}, or "
    raise UserError(
        f"model.path={path}: its weights are quantised {how}; {choice}write its real values once, "
        f"`mft convert model.path={path} --out FOLDER`, and train on that folder"
    )


def loading_config(
    config: PreTrainedConfig, weights: WeightFormat, computing: torch.dtype | None
) -> PreTrainedConfig:
    """Returns a transformers config by which from_pretrained reads a quantised checkpoint: dequantised while
    loading, or, by bitsandbytes, in its own bits; computing: the dtype that these compute in."""
    # Models that also see keep it in the config of their text part.
    part = config if getattr(config, "quantization_config", None) else config.get_text_config()
    values = dict(part.quantization_config)
    if weights.method != BNB:
        values["dequantize"] = True
    elif computing is not None:
        values["bnb_4bit_compute_dtype"] = str(computing).removeprefix("torch.")
    part.quantization_config = values
    return config


def cast_unquantised(model: PreTrainedModel, dtype: torch.dtype) -> None:
    """Casts what transformers left as it was stored while it dequantised: embeddings, norms, the head."""
    # Their dtypes are the checkpoint's: a mixture that no precision of a run expects.
    kept = kept_in_float32(model)
    for name, parameter in model.named_parameters():
        if parameter.is_floating_point() and not any(part in name for part in kept):
            parameter.data = parameter.data.to(dtype)
