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
from mft.model.quantised_tensors import BNB, READ, WAY_OUT, check_tensors
from mft.model.safetensors_header import tensors, weight_files
from mft.model.transformers_private import kept_in_float32

if TYPE_CHECKING:
    import torch

FORMATS = ("float-quantized", "int-quantized", "pack-quantized")
"""Formats of compressed-tensors that are read."""


@dataclass(frozen=True)
class WeightFormat:
    """How the weights of a checkpoint are stored."""

    method: str = ""
    """quant_method of its config.json, "" for plain weights."""

    settings: Mapping[str, Any] = field(default_factory=dict)
    """All that config.json says about the quantisation."""

    @property
    def bits(self) -> int:
        """Bits of a weight of bitsandbytes, 0 for any other method."""
        return 0 if self.method != BNB else 4 if self.settings.get("load_in_4bit") else 8


def weight_format(who: str, config: Mapping[str, Any], folder: Path | None) -> WeightFormat:
    """Returns how the weights of a checkpoint are stored.

    who: begins a sentence about it, e.g. model.path=x; config: its config.json; folder: where its weight
    files lie, None as long as they are not on this machine.

    Raises UserError, with the way out, for a method that is not read, for weights that are not what
    config.json says, and for an adapter's weights among the base's.
    """
    stored = _named(who, config)
    if stored.method and stored.method not in READ:
        raise UserError(
            f"{who}: its weights are quantised by {stored.method}, as config.json says, which cannot be "
            f"read here; {WAY_OUT}"
        )
    if stored.method == "compressed-tensors":
        _check_compressed(who, stored.settings)
    if stored.settings.get("modules_to_convert"):
        raise UserError(
            f"{who}: quantization_config.modules_to_convert in its config.json keeps embeddings in fp8, "
            f"which cannot be trained; {WAY_OUT}"
        )
    if folder is not None:
        headers = {name: tensor for file in weight_files(folder) for name, tensor in tensors(file).items()}
        check_tensors(who, stored.method, stored.settings, headers, folder)
    return stored


def _named(who: str, config: Mapping[str, Any]) -> WeightFormat:
    """Returns what config.json says; UserError where it says so in a place that transformers does not look
    at."""
    for where, settings in _settings(config):
        if not isinstance(settings, Mapping):
            raise UserError(f"{who}: {where} in its config.json must be an object")
        of_bnb = settings.get("load_in_4bit") or settings.get("load_in_8bit")
        named = BNB if of_bnb else settings.get("quant_method")
        if not named or (named == BNB and not of_bnb):
            raise UserError(
                f"{who}: {where} in its config.json does not name the method by which the weights are "
                f"quantised; {WAY_OUT}"
            )
        method = (
            named if isinstance(named, str) and re.fullmatch(r"[\w.+-]{1,40}", named) else shortened(named)
        )
        if where not in ("quantization_config", "text_config.quantization_config"):
            raise UserError(
                f"{who}: its weights are quantised by {method}, as {where} in its config.json says, where "
                f"transformers does not look for it; {WAY_OUT}"
            )
        return WeightFormat(method, settings)
    return WeightFormat()


def _settings(values: Mapping[str, Any], path: str = "") -> Iterator[tuple[str, Any]]:
    """Yields what a config.json says about quantisation and where, from the outside to the parts of the
    model."""
    keys = ("quantization_config", "compression_config")
    yield from ((path + key, values[key]) for key in keys if values.get(key) is not None)
    for key, value in values.items():
        if key not in keys and isinstance(value, Mapping):
            yield from _settings(value, f"{path}{key}.")


def _check_compressed(who: str, settings: Mapping[str, Any]) -> None:
    if importlib.util.find_spec("compressed_tensors") is None:
        raise UserError(
            f"{who}: its weights are quantised by compressed-tensors, which needs the package of that "
            f"name: pip install compressed-tensors, or {WAY_OUT}"
        )
    groups, sparsity = settings.get("config_groups") or {}, settings.get("sparsity_config") or {}
    what = (
        f"of the format {settings.get('format')}"
        if settings.get("format") not in FORMATS
        else f"in {len(groups)} groups"
        if len(groups) != 1  # transformers reads all dense layers by the first
        else f"with sparsity {sparsity}"
        if sparsity and sparsity.get("format") != "dense"
        else ""
    )
    if what:
        raise UserError(
            f"{who}: its weights are quantised by compressed-tensors {what}, which cannot be read here. "
            f"Allowed: one group of the format {', '.join(FORMATS)}, without sparsity; {WAY_OUT}"
        )


def refuse_quantised(path: str, weights: WeightFormat, bits: int) -> None:
    """Raises UserError for a checkpoint that cannot be trained as it is stored: quantised, unless by
    bitsandbytes to the bits that peft=qlora asks for; bits: those, 0 for a base that is not to be
    quantised."""
    if not weights.method or (weights.bits and weights.bits == bits):
        return
    way = (
        f"write its real values once, `mft convert model.path={path} --out FOLDER`, and train on that folder"
    )
    if weights.bits and bits:
        raise UserError(
            f"peft.bits={bits}: bitsandbytes has quantised model.path={path} to {weights.bits} bits "
            f"already; choose peft.bits={weights.bits}, or {way}"
        )
    if weights.bits:
        raise UserError(
            f"model.path={path}: bitsandbytes has quantised its weights to {weights.bits} bits; choose "
            f"peft=qlora with peft.bits={weights.bits}, or {way}"
        )
    raise UserError(f"model.path={path}: its weights are quantised by {weights.method}; {way}")


def loading_config(config: Any, weights: WeightFormat, computing: torch.dtype | None) -> Any:
    """Returns a transformers config by which from_pretrained reads a quantised checkpoint: dequantised while
    loading, or, by bitsandbytes, in its own bits; computing: the dtype that these compute in."""
    part = config if getattr(config, "quantization_config", None) else config.get_text_config()
    values = dict(part.quantization_config)
    if weights.method != BNB:
        values["dequantize"] = True
    elif computing is not None:
        values["bnb_4bit_compute_dtype"] = str(computing).removeprefix("torch.")
    part.quantization_config = values
    return config


def cast_unquantised(model: Any, dtype: torch.dtype) -> None:
    """Casts what transformers left as it was stored while it dequantised: embeddings, norms, the head."""
    kept = kept_in_float32(model)
    for name, parameter in model.named_parameters():
        if parameter.is_floating_point() and not any(part in name for part in kept):
            parameter.data = parameter.data.to(dtype)
