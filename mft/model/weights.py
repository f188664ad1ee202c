"""Checks a loaded model against its checkpoint: no weight is missing, left over, or of another shape."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mft.errors import UserError
from mft.model.introspect import full_shape
from mft.model.safetensors_header import Shape, tensors, weight_files
from mft.model.transformers_private import leftover_weights, zero3_is_on

SIZES = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "vocab_size")
"""Keys of config.json whose absence is mentioned beside a wrong shape, since a default was taken."""

BUFFERS = re.compile(
    r"rotary_(pos_)?emb\.inv_freq$|(attn|attention)\.(bias|masked_bias|causal_mask)$|(position_ids)$"
)
"""Buffers that older releases carry and models make themselves: rotary frequencies, causal masks,
positions."""


def check_loaded(source: Path, model: Any, info: Mapping[str, Any]) -> None:
    """Raises UserError for a model whose checkpoint does not fit config.json: weights of other shapes, none
    for some of the model, or some that the model does not take, beside those that transformers lists as left
    out on purpose.

    source: the folder, or a hub name; info: loading info of from_pretrained.
    """
    kind = type(model).__name__
    wrong = [(name, tuple(there), tuple(expected)) for name, there, expected in info["mismatched_keys"]]
    for name, module in model.named_modules():
        if type(module).__module__.startswith(
            "bitsandbytes"
        ):  # transformers quantises weights of whatever shape
            expected = (module.out_features, module.in_features)
            if (there := full_shape(module.weight)) != expected:
                wrong.append((f"{name}.weight", there, expected))
    if wrong:
        others = f"; {len(wrong) - 1} more do not fit" if len(wrong) > 1 else ""
        raise UserError(
            f"model.path={source}: {_mismatch(source, model, min(wrong))}{others}{_defaults(source, model)}"
        )
    unexpected = info["unexpected_keys"] | _passed_over(source, model)
    unknown = sorted(name for name in unexpected if not is_former_buffer(name, _shape(name, source)))
    of_other = f"; {source} has {unknown[0]}{and_others(len(unknown))} instead" if unknown else ""
    if missing := sorted(info["missing_keys"]):
        raise UserError(
            f"model.path={source} lacks the weight {missing[0]} of a {kind}{and_others(len(missing))}: it "
            f"would be trained from random values{of_other}{_defaults(source, model)}"
        )
    if unknown:
        raise UserError(
            f"model.path={source} has the weight {unknown[0]}{_file_of(unknown[0], source)}, which a "
            f"{kind} does not take{and_others(len(unknown))}: it would be left out; give a checkpoint of "
            "this very architecture"
        )


def _passed_over(source: Path, model: Any) -> set[str]:
    """Returns the weights of a folder that a model does not take, where transformers does not count them:
    ZeRO-3."""
    if not zero3_is_on() or not source.is_dir():
        return set()
    return leftover_weights(model, [name for file in weight_files(source) for name in tensors(file)])


def is_former_buffer(name: str, shape: Shape) -> bool:
    """Whether a tensor that a model does not take is a buffer of an older release, by its name and its
    shape."""
    if not BUFFERS.search(name):
        return False
    mask = len(shape) == 4 and shape[:2] == (1, 1)
    return not name.endswith("bias") or mask or math.prod(shape) == 1


def _shape(name: str, source: Path) -> Shape:
    return next((tensors(file)[name].shape for file in _files(source) if name in tensors(file)), ())


def _files(source: Path) -> list[Path]:
    return weight_files(source) if source.is_dir() else []


def _file_of(name: str, source: Path) -> str:
    return next((f" in {file.name}" for file in _files(source) if name in tensors(file)), "")


def and_others(count: int) -> str:
    """Returns a remark on the rest of `count` things of which one was named."""
    return f", and {count - 1} {'others' if count > 2 else 'other'}" if count > 1 else ""


def _mismatch(folder: Path, model: Any, wrong: tuple[str, Shape, Shape]) -> str:
    """Returns a sentence on a weight: (name, shape in the checkpoint, shape by config.json)."""
    name, there, expected = wrong
    for file in _files(folder):
        shapes = {name: tensor.shape for name, tensor in tensors(file).items()}
        if name in shapes and any(key.startswith(f"{name}.quant_state.") for key in shapes):
            return (
                f"{name} in {file.name} is packed to 4 bits by bitsandbytes and stands for {list(there)}, by "
                f"config.json it is {list(expected)}"
            )
        if name in shapes:
            return f"{name} in {file.name} is {list(shapes[name])}, by config.json it is {list(expected)}"
    return f"{name} is {list(there)}, by config.json it is {list(expected)}"


def _defaults(folder: Path, model: Any) -> str:
    """Returns a remark on sizes that config.json does not name, so that a default was taken; "" for none."""
    file = folder / "config.json"
    if not file.is_file():
        return ""
    values, config = json.loads(file.read_text(encoding="utf-8")), model.config
    names = {name: {name, config.attribute_map.get(name, name)} for name in SIZES if hasattr(config, name)}
    absent = [name for name, either in names.items() if not either & values.keys()]
    if not absent:
        return ""
    return f"; config.json has no {' and no '.join(absent)}, so the default of {type(model.config).__name__} was taken"
