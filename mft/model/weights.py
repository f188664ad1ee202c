"""The weight files of a model folder, judged by their headers: whole, all there, and of the shapes config.json says."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

from mft.errors import UserError, nearest
from mft.model.introspect import whole_shape

INDEX = "model.safetensors.index.json"
SIZES = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "vocab_size")
Shape = tuple[int, ...]
FLOATS = ("F64", "F32", "F16", "BF16")
"""What safetensors calls the types of plain weights."""

BUFFERS = re.compile(r"rotary_(pos_)?emb\.inv_freq$|(attn|attention)\.(bias|masked_bias|causal_mask)$|(position_ids)$")
"""Buffers that older releases carry and models make themselves: rotary frequencies, causal masks, positions."""


class Tensor(NamedTuple):
    """A tensor by the header of its file; dtype: as safetensors calls it, e.g. BF16 or F8_E4M3."""

    dtype: str
    shape: Shape


def check_files(folder: Path) -> None:
    """Raises UserError for a weight file that is cut short or is none, for a shard that is missing, and for shards
    without an index; reads no weights."""
    for file in sorted(folder.glob("*.safetensors")):
        tensors(file)
    weight_files(folder)


def weight_files(folder: Path) -> list[Path]:
    """Returns the files that a model is loaded from, none where there are no safetensors; UserError for shards without
    an index, or one that is missing."""
    files = sorted(folder.glob("*.safetensors"))
    if not files:
        return []
    whole, index = folder / "model.safetensors", folder / INDEX
    if whole.is_file():  # which is read before any index
        return [whole]
    if not index.is_file():
        raise UserError(
            f"{folder} has {files[0].name}, but neither model.safetensors nor {INDEX}, which says where weights lie"
        )
    try:
        named = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{index} cannot be read: it is no JSON object with a weight_map ({error})") from error
    there = {file.name for file in files}
    if absent := sorted(named - there):
        raise UserError(
            f"{index} names {absent[0]}, which is not in the folder{nearest(absent[0], there - named)}; "
            f"{len(absent)} of {len(named)} files are missing"
        )
    return [file for file in files if file.name in named]


def tensors(file: Path) -> dict[str, Tensor]:
    """Returns every tensor of a safetensors file, by name; UserError for a file that is cut short or is none."""
    stat = file.stat()
    return _header(file, stat.st_size, stat.st_mtime_ns)


@lru_cache(maxsize=512)  # a run's parent asks several times
def _header(file: Path, size: int, changed: int) -> dict[str, Tensor]:
    with file.open("rb") as stream:
        length = int.from_bytes(stream.read(8), "little")
        start = stream.read(64)
        if b"git-lfs" in start:
            raise UserError(f"{file} is a pointer of git-lfs, not the file itself; fetch it with git lfs pull")
        try:
            if length > size - 8:
                raise ValueError(f"its header would take {length:,} bytes")
            header = json.loads(start[:length] + stream.read(max(0, length - 64)))
            values = {name: value for name, value in header.items() if name != "__metadata__"}
            end = 8 + length + max((value["data_offsets"][1] for value in values.values()), default=0)
            found = {name: Tensor(value["dtype"], tuple(value["shape"])) for name, value in values.items()}
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise UserError(f"{file}, {size:,} bytes long, is not a safetensors file: {error}") from error
    if end != size:
        what = "cut short: fetch it again" if size < end else "longer than it should be"
        raise UserError(f"{file} is {size:,} bytes long where its header says {end:,}; it is {what}")
    return found


def check_loaded(source: Path, model: Any, found: Mapping[str, Any]) -> None:
    """Raises UserError for a model whose checkpoint does not fit config.json: weights of other shapes, none for some of
    the model, or some that the model does not take, beside those that transformers lists as left out on purpose.

    source: the folder, or a hub name; found: loading info of from_pretrained.
    """
    own = type(model).__name__.startswith("Original")  # a reader of legacy.native; people know the class below
    kind = (type(model).__bases__[0] if own else type(model)).__name__
    wrong = [(name, tuple(there), tuple(expected)) for name, there, expected in found["mismatched_keys"]]
    for name, module in model.named_modules():
        if type(module).__module__.startswith("bitsandbytes"):  # transformers quantises weights of whatever shape
            expected = (module.out_features, module.in_features)
            if (there := whole_shape(module.weight)) != expected:
                wrong.append((f"{name}.weight", there, expected))
    if wrong:
        others = f"; {len(wrong) - 1} more do not fit" if len(wrong) > 1 else ""
        raise UserError(
            f"model.path={source}: {_mismatch(source, model, min(wrong))}{others}{_defaults(source, model)}"
        )
    unknown = sorted(
        name for name in found["unexpected_keys"] | _passed_over(source, model) if not _buffer(name, source)
    )
    of_other = f"; {source} has {unknown[0]}{and_others(len(unknown))} instead" if unknown else ""
    if missing := sorted(found["missing_keys"]):
        raise UserError(
            f"model.path={source} lacks the weight {missing[0]} of a {kind}{and_others(len(missing))}: it would be "
            f"trained from random values{of_other}{_defaults(source, model)}"
        )
    if unknown:
        raise UserError(
            f"model.path={source} has the weight {unknown[0]}{_file_of(unknown[0], source)}, which a {kind} does not "
            f"take{and_others(len(unknown))}: it would be left out; give a checkpoint of this very architecture"
        )


def _passed_over(source: Path, model: Any) -> set[str]:
    """Returns the weights of a folder that a model does not take, where transformers does not count them: ZeRO-3."""
    from transformers.integrations.deepspeed import is_deepspeed_zero3_enabled

    if not is_deepspeed_zero3_enabled() or not source.is_dir():
        return set()
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key

    steps, state = get_model_conversion_mapping(model), model.state_dict()
    renamings = [step for step in steps if isinstance(step, WeightRenaming)]
    converters = [step for step in steps if isinstance(step, WeightConverter)]
    names = {
        rename_source_key(name, renamings, converters, model.base_model_prefix, state)[0]
        for file in weight_files(source)
        for name in tensors(file)
    }
    ignored = model._keys_to_ignore_on_load_unexpected or ()
    return {name for name in names - state.keys() if not any(re.search(pattern, name) for pattern in ignored)}


def _buffer(name: str, source: Path) -> bool:
    """Whether a tensor that a model does not take is a buffer of an older release, by its name and its shape."""
    if not BUFFERS.search(name):
        return False
    shape = next((tensors(file)[name].shape for file in _files(source) if name in tensors(file)), ())
    mask = len(shape) == 4 and shape[:2] == (1, 1)
    return not name.endswith("bias") or mask or math.prod(shape) == 1


def _files(source: Path) -> list[Path]:
    return weight_files(source) if source.is_dir() else []


def _file_of(name: str, source: Path) -> str:
    return next((f" in {file.name}" for file in _files(source) if name in tensors(file)), "")


def and_others(count: int) -> str:
    """Returns a remark on the rest of `count` things of which one was named."""
    return f", and {count - 1} {'others' if count > 2 else 'other'}" if count > 1 else ""


def _mismatch(folder: Path, model: Any, wrong: tuple[str, Shape, Shape]) -> str:
    """Returns a sentence on a weight: (name, shape in the checkpoint, shape by config.json)."""
    from mft.model.legacy.native import original_names

    name, there, expected = wrong
    for file in _files(folder):
        whole = {name: tensor.shape for name, tensor in tensors(file).items()}
        stored = original_names(type(model), whole).get(name, "")
        if stored in whole and any(key.startswith(f"{stored}.quant_state.") for key in whole):
            return (
                f"{stored} in {file.name} is packed to 4 bits by bitsandbytes and stands for {list(there)}, by "
                f"config.json it is {list(expected)}"
            )
        if stored in whole:
            it = "it" if whole[stored] == there else f"its part {name}"
            return f"{stored} in {file.name} is {list(whole[stored])}, by config.json {it} is {list(expected)}"
    return f"{name} is {list(there)}, by config.json it is {list(expected)}"


def _defaults(folder: Path, model: Any) -> str:
    """Returns a remark on sizes that config.json does not name, so that a default was taken; "" for none."""
    file = folder / "config.json"
    if not file.is_file() or type(model).__module__ == "mft.model.legacy.native":  # whose families ask for every size
        return ""
    values, config = json.loads(file.read_text(encoding="utf-8")), model.config
    names = {name: {name, config.attribute_map.get(name, name)} for name in SIZES if hasattr(config, name)}
    absent = [name for name, either in names.items() if not either & values.keys()]
    if not absent:
        return ""
    return f"; config.json has no {' and no '.join(absent)}, so the default of {type(model.config).__name__} was taken"
