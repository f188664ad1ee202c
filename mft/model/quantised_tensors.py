"""Quantised weights in the headers of safetensors files: how they are recognised, and whether those of each
supported method are complete and have shapes that transformers reads correctly.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from mft.errors import UserError
from mft.model.safetensors_header import FLOATS, Tensor
from mft.model.weights import and_others

BNB = "bitsandbytes"
WAY_OUT = "give the release of this model that is not quantised (peft=qlora holds it in 4 bits)"

OLD_CONFIGS = ("quantize_config.json", "quant_config.json")
"""Files in which older releases of GPTQ and AWQ say how they quantised."""

STATE_OF_4_BITS = ".quant_state.bitsandbytes__"
ADAPTER = re.compile(r"(^|\.)lora_(A|B|embedding_A|embedding_B|magnitude_vector)\b")
NO_WEIGHT = re.compile(r"(bias|ids?|mask|idx|index|indices|weight_format)$")
"""Last parts of names of whole numbers that a plain model may have: attention masks, positions, tables of
ids."""

Tensors = Mapping[str, Tensor]
Settings = Mapping[str, Any]
"""quantization_config of a config.json."""


def check_tensors(who: str, method: str, settings: Settings, stored: Tensors, folder: Path) -> None:
    """Raises UserError for tensors that contradict the quantisation named in config.json.

    who: begins the sentence; method, settings: quant_method and the rest of config.json's
    quantization_config, "" and nothing for plain weights; stored: all tensors of the checkpoint, by name;
    folder: where it lies.
    """
    if adapter := [name for name in stored if ADAPTER.search(name)]:
        raise UserError(
            f"{who} holds weights of an adapter among its own ({adapter[0]}{and_others(len(adapter))}); "
            "give the plain base as model.path, and the adapter's own folder as peft.path"
        )
    quantised = {name: tensor for name, tensor in stored.items() if _quantised(name, tensor)}
    if not method and quantised:
        name = min(quantised, key=lambda n: STATE_OF_4_BITS in n)
        kind, dtype = "quantised weights", f" is {quantised[name].dtype}"
        if any(STATE_OF_4_BITS in n for n in quantised):
            kind, dtype = "weights packed to 4 bits by bitsandbytes", ""
        old = [f" ({n} belongs to a release of GPTQ or AWQ)" for n in OLD_CONFIGS if (folder / n).is_file()]
        raise UserError(
            f"{who} holds {kind} ({name}{dtype}{and_others(len(quantised))}), but its config.json has no "
            f"quantization_config that says how to read them{''.join(old[:1])}; {WAY_OUT}"
        )
    if method and stored and not quantised:
        raise UserError(
            f"{who}: config.json says that the weights are quantised by {method}, but all {len(stored)} are "
            f"plain {next(iter(stored.values())).dtype}; if these are real values, remove quantization_config"
        )
    for name, tensor in quantised.items() if method else ():
        if why := UNREADABLE[method](name, tensor, stored, settings):
            raise UserError(f"{who}: its weights are quantised by {method}, but {name} {why}; {WAY_OUT}")


def _quantised(name: str, tensor: Tensor) -> bool:
    """Whether a tensor is not a plain weight of a model: in 8 bits or less, or packed into whole numbers."""
    if STATE_OF_4_BITS in name:
        return True
    if tensor.dtype in FLOATS or tensor.dtype in ("BOOL", "I64", "U64", "C64"):
        return False
    return tensor.dtype.startswith("F") or not NO_WEIGHT.search(name)


def _fp8(name: str, tensor: Tensor, stored: Tensors, settings: Settings) -> str:
    """Returns why an 8-bit weight cannot be turned into its values, "" if it can: transformers multiplies
    each block of a weight by its scale, and takes the scales' number for that of the blocks."""
    if name.endswith(".weight_scale_inv"):  # exponents, in one byte each
        return "" if name.removesuffix("_scale_inv") in stored else "has no weight beside it"
    scale = stored.get(f"{name}_scale_inv")
    if not name.endswith(".weight") or not tensor.dtype.startswith("F8") or scale is None:
        return f"({tensor.dtype}) has no scale called {name}_scale_inv, the only ones that transformers reads"
    shape, scales = tensor.shape, scale.shape
    if scales in ((), (1,), (1, 1), (shape[0] if shape else 1, 1)):  # one for all, or one a row
        return ""
    size = settings.get("weight_block_size", [128, 128])
    if len(shape) != 2 or len(scales) != 2 or not isinstance(size, list) or len(size) != 2:
        return f"of {list(shape)} has scales of {list(scales)}, which are not its blocks of {size}"
    if all(n == 1 or n * block == length for n, block, length in zip(scales, size, shape, strict=True)):
        return ""
    return f"of {list(shape)} is not divided evenly by its blocks of {size}, which transformers cannot read"


def _mxfp4(name: str, tensor: Tensor, stored: Tensors, settings: Settings) -> str:
    match = re.fullmatch(r"(.*\.(?:gate_up_proj|down_proj))_(blocks|scales)", name)
    if not match:
        return f"({tensor.dtype}) is not one of the experts' blocks and scales"
    beside = f"{match[1]}_{'scales' if match[2] == 'blocks' else 'blocks'}"
    return "" if beside in stored else f"has no {beside} beside it"


def _bnb(name: str, tensor: Tensor, stored: Tensors, settings: Settings) -> str:
    if not name.endswith(".weight"):
        return ""
    bits, states = 8, [f"{name.removesuffix('weight')}SCB"]
    if settings.get("load_in_4bit"):
        bits, states = 4, [f"{name}{STATE_OF_4_BITS}{kind}" for kind in ("nf4", "fp4")]
    complete = any(state in stored for state in states)
    return "" if complete else f"({tensor.dtype}) lacks its state of {bits} bits"


def _compressed(name: str, tensor: Tensor, stored: Tensors, settings: Settings) -> str:
    module, _, last = name.rpartition(".")
    if last not in ("weight", "weight_packed") or f"{module}.weight_scale" in stored:
        return ""
    return f"({tensor.dtype}) has no {module}.weight_scale beside it"


UNREADABLE: dict[str, Callable[[str, Tensor, Tensors, Settings], str]] = {
    BNB: _bnb,
    "fp8": _fp8,
    "mxfp8": _fp8,
    "mxfp4": _mxfp4,
    "compressed-tensors": _compressed,
}
"""Value of quant_method whose weights can be turned into real values, on any machine → what finds out why
one of its tensors cannot."""
