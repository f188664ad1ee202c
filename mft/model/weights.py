"""Checks a loaded model against its checkpoint: no weight is missing, left over, or of another shape."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mft.errors import UserError
from mft.model.introspect import full_shape
from mft.model.model_folder import read_config
from mft.model.safetensors_header import Shape, Stored, stored_tensors
from mft.model.transformers_private import leftover_weights, zero3_is_on

if TYPE_CHECKING:
    from transformers import PreTrainedModel

SIZES = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "vocab_size")
"""Keys of config.json whose absence is mentioned beside a wrong shape, since a default was taken."""

BUFFERS = re.compile(
    r"rotary_(pos_)?emb\.inv_freq$|(attn|attention)\.(bias|masked_bias|causal_mask)$|(position_ids)$"
)
"""Buffers that older releases carry and models make themselves: rotary frequencies, causal masks,
positions."""


def check_loaded(source: Path, model: PreTrainedModel, info: Mapping[str, Any]) -> None:
    """Raises UserError for a model whose checkpoint does not fit config.json: weights of other shapes, none
    for some of the model, or some that the model does not take, beside those that transformers lists as left
    out on purpose.

    source: the folder, or a hub name; info: loading info of from_pretrained.
    """
    stored = stored_tensors(source) if source.is_dir() else {}
    shapes = [(name, tuple(there), tuple(expected)) for name, there, expected in info["mismatched_keys"]]
    for name, module in model.named_modules():
        # transformers quantises a weight of any shape and counts it as loaded
        if type(module).__module__.startswith("bitsandbytes"):
            expected = (module.out_features, module.in_features)
            if (there := full_shape(module.weight)) != expected:
                shapes.append((f"{name}.weight", there, expected))
    unexpected = set(info["unexpected_keys"])
    if zero3_is_on():  # where transformers does not count them
        unexpected |= leftover_weights(model, stored)
    unknown = sorted(name for name in unexpected if not is_former_buffer(name, _shape(stored, name)))
    wrong = [(name, _mismatch(stored, name, there, expected)) for name, there, expected in shapes]
    missing, note = sorted(info["missing_keys"]), _defaults(source, model)
    refuse_misfits(f"model.path={source}", model, stored, wrong, missing, unknown, note)


def refuse_misfits(
    who: str,
    model: PreTrainedModel,
    stored: Stored,
    wrong: Sequence[tuple[str, str]],
    missing: Sequence[str],
    unknown: Sequence[str],
    note: str = "",
) -> None:
    """Raises UserError for the first weight that does not fit a model, in a sentence that counts the others.

    who: begins the sentence; wrong: names of weights, with a clause on their shapes; missing: names of
    weights that the model has and the checkpoint lacks; unknown: the reverse; note: a remark at its end.
    """
    kind = type(model).__name__
    if wrong:
        others = f"; {len(wrong) - 1} more do not fit" if len(wrong) > 1 else ""
        raise UserError(f"{who}: {min(wrong)[1]}{others}{note}")
    if missing:
        instead = f"; it has {unknown[0]}{and_others(len(unknown))} instead" if unknown else ""
        raise UserError(
            f"{who} lacks the weight {missing[0]} of a {kind}{and_others(len(missing))}: it would be trained "
            f"from random values{instead}{note}"
        )
    if unknown:
        raise UserError(
            f"{who} has the weight {unknown[0]}{_file(stored, unknown[0])}, which a {kind} does not take"
            f"{and_others(len(unknown))}: it would be left out; give a checkpoint of this very architecture"
        )


def is_former_buffer(name: str, shape: Shape) -> bool:
    """Whether a tensor that a model does not take is a buffer of an older release, by its name and its
    shape."""
    if not BUFFERS.search(name):
        return False
    mask = len(shape) == 4 and shape[:2] == (1, 1)
    return not name.endswith("bias") or mask or math.prod(shape) == 1


def and_others(count: int) -> str:
    """Returns a remark on the rest of `count` things of which one was named."""
    return f", and {count - 1} {'others' if count > 2 else 'other'}" if count > 1 else ""


def _shape(stored: Stored, name: str) -> Shape:
    return stored[name][1].shape if name in stored else ()


def _file(stored: Stored, name: str) -> str:
    """Returns " in FILE"; "" for a name that only the model has, e.g. of experts that it joins on loading."""
    return f" in {stored[name][0]}" if name in stored else ""


def _mismatch(stored: Stored, name: str, there: Shape, expected: Shape) -> str:
    """Returns a clause on a weight of another shape than config.json says."""
    packed = any(key.startswith(f"{name}.quant_state.") for key in stored)
    stands = "packed to 4 bits by bitsandbytes and stands for " if packed else ""
    return f"{name}{_file(stored, name)} is {stands}{list(there)}, by config.json it is {list(expected)}"


def _defaults(folder: Path, model: PreTrainedModel) -> str:
    """Returns a remark on sizes that config.json does not name, so that a default was taken; "" for none."""
    values, config = read_config(folder), model.config
    names = {name: {name, config.attribute_map.get(name, name)} for name in SIZES if hasattr(config, name)}
    absent = [name for name, either in names.items() if values and not either & values.keys()]
    if not absent:
        return ""
    sizes = " and no ".join(absent)
    return f"; config.json has no {sizes}, so the default of {type(config).__name__} was taken"
