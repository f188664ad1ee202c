"""How bitsandbytes holds the base of a QLoRA run: which values there are, what they leave out, and what that takes."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from mft.errors import UserError, nearest

if TYPE_CHECKING:
    import torch
    from torch import nn
    from transformers import BitsAndBytesConfig

    from mft.model.peft.modes import QLora

PRECISIONS = {"bf16": "bfloat16", "fp16": "float16", "fp32": "float32"}

ALLOWED: dict[str, tuple[Any, ...]] = {
    "bits": (4, 8),
    "quant_type": ("nf4", "fp4"),
    "compute_dtype": (None, *PRECISIONS),
    "storage_dtype": ("uint8", *PRECISIONS),
}
"""Values of the settings of peft=qlora that have a list of them."""

HEADS = ("lm_head", "embed_out", "output_layer")
"""Names of output layers in transformers."""


def compute_dtype(precision: str) -> torch.dtype:
    """Returns the torch dtype that a run of precision bf16, fp16 or fp32 computes in."""
    import torch

    return getattr(torch, PRECISIONS[precision])


def check(qlora: QLora) -> None:
    """Raises UserError for values that no model can take."""
    for name, values in ALLOWED.items():
        value = getattr(qlora, name)
        if value not in values:
            listed = ", ".join("null" if v is None else str(v) for v in values)
            raise UserError(f"peft.{name}={value!r} is not one of {listed}{nearest(str(value), map(str, values))}")
    if qlora.bits == 8 and qlora.use_dora:
        raise UserError(
            "peft.use_dora=true needs the weights while it is attached, which 8-bit layers do not give back before "
            "they have computed; choose peft.bits=4 or peft.use_dora=false"
        )
    if qlora.changes_base:
        raise UserError(
            f"peft.init={qlora.init} takes the largest part out of the base's weights, which quantised weights "
            "cannot hold; choose peft.init=true, or peft=lora"
        )


def config(qlora: QLora, computing: torch.dtype) -> BitsAndBytesConfig:
    """Returns the settings as transformers takes them; computing: the run's dtype, for a compute_dtype of null."""
    import torch
    from transformers import BitsAndBytesConfig

    # given patterns replace transformers' own list, which is the head, and are matched from the start of a path
    skip = [rf"(?:.*\.)?{re.escape(n)}" for n in (*qlora.skip_modules, *HEADS)] if qlora.skip_modules else None
    if qlora.bits == 8:
        return BitsAndBytesConfig(load_in_8bit=True, llm_int8_skip_modules=skip)
    return BitsAndBytesConfig(
        load_in_4bit=True,
        llm_int8_skip_modules=skip,
        bnb_4bit_quant_type=qlora.quant_type,
        bnb_4bit_use_double_quant=qlora.double_quant,
        bnb_4bit_compute_dtype=compute_dtype(qlora.compute_dtype) if qlora.compute_dtype else computing,
        bnb_4bit_quant_storage=getattr(torch, PRECISIONS.get(qlora.storage_dtype, qlora.storage_dtype)),
    )


def kept(qlora: QLora, stored: Mapping[str, Any]) -> str:
    """Returns the settings that do nothing on a base that bitsandbytes has quantised otherwise, "" for none.

    stored: quantization_config of the base's config.json.
    """
    own: dict[str, Any] = {"skip_modules": stored.get("llm_int8_skip_modules") or []}
    if qlora.bits == 4:
        own |= {
            "quant_type": stored.get("bnb_4bit_quant_type", "fp4"),
            "double_quant": stored.get("bnb_4bit_use_double_quant", False),
            "storage_dtype": stored.get("bnb_4bit_quant_storage", "uint8"),
        }
    asked = {name: getattr(qlora, name) for name in own}
    asked["storage_dtype"] = PRECISIONS.get(qlora.storage_dtype, qlora.storage_dtype)
    differing = [name for name in own if asked[name] != own[name] and (name != "skip_modules" or asked[name])]
    return ", ".join(f"{name}={own[name]} (asked: {asked[name]})" for name in differing)


def check_skipped(model: nn.Module, names: Sequence[str]) -> None:
    """Raises UserError for a name of peft.skip_modules that is no part of the model, with the nearest one."""
    from mft.model.peft.targets import sites

    places = sites(model)
    for name in names:
        if not any(f".{name}." in f".{site.path}." for site in places):
            known = list(dict.fromkeys(site.name for site in places))
            raise UserError(
                f"peft.skip_modules: {name!r} matches no module; this model has {', '.join(known)}"
                f"{nearest(name, known)}"
            )


def experts_left(model: nn.Module, dtype: torch.dtype) -> str:
    """Returns the sentence about routed experts, which stay unquantised, and what they take in `dtype`; "" for a model
    without any. model: also one on the meta device."""
    from mft.model.peft.targets import roles, weights

    found = list(weights(model))
    kinds = roles({path: shape for path, _, shape in found})
    experts = sum(parameter.numel() for path, parameter, _ in found if kinds[path] == "experts")
    if not experts:
        return ""
    every = sum(parameter.numel() for _, parameter, _ in found)
    return (
        f"peft=qlora: bitsandbytes quantises linear layers only, so the routed experts, {experts / every:.0%} of all "
        f"weights, stay in {str(dtype).removeprefix('torch.')} and take {experts * dtype.itemsize / 2**30:.3g} GiB"
    )
