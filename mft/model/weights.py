"""The weight files of a model folder, judged by their headers: whole, all there, and of the shapes config.json says."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mft.errors import UserError, nearest
from mft.model.parts import whole_shape

INDEX = "model.safetensors.index.json"
SIZES = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "vocab_size")
Shape = tuple[int, ...]

log = logging.getLogger(__name__)


def check_files(folder: Path) -> None:
    """Raises UserError for a weight file that is cut short or is none, for a shard that is missing, and for shards
    without an index; reads no weights."""
    files = sorted(folder.glob("*.safetensors"))
    for file in files:
        shapes(file)
    index = folder / INDEX
    if (folder / "model.safetensors").is_file():  # which is read before any index
        return
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


def shapes(file: Path) -> dict[str, Shape]:
    """Returns the shape of every tensor of a safetensors file; UserError for a file that is cut short or is none."""
    size = file.stat().st_size
    with file.open("rb") as stream:
        length = int.from_bytes(stream.read(8), "little")
        start = stream.read(64)
        if b"git-lfs" in start:
            raise UserError(f"{file} is a pointer of git-lfs, not the file itself; fetch it with git lfs pull")
        try:
            if length > size - 8:
                raise ValueError(f"its header would take {length:,} bytes")
            header = json.loads(start[:length] + stream.read(max(0, length - 64)))
            tensors = {name: value for name, value in header.items() if name != "__metadata__"}
            end = 8 + length + max((value["data_offsets"][1] for value in tensors.values()), default=0)
            found = {name: tuple(value["shape"]) for name, value in tensors.items()}
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise UserError(f"{file}, {size:,} bytes long, is not a safetensors file: {error}") from error
    if end != size:
        what = "cut short: fetch it again" if size < end else "longer than it should be"
        raise UserError(f"{file} is {size:,} bytes long where its header says {end:,}; it is {what}")
    return found


def check_loaded(source: Path, model: Any, found: Mapping[str, Any], whole: bool) -> None:
    """Raises UserError for a model whose checkpoint does not fit config.json: weights of other shapes, none for some of
    the model, or, if `whole`, some that the model has not; otherwise these are left out with a warning.

    source: the folder, or a hub name; found: loading info of from_pretrained.
    """
    own = type(model).__name__.startswith("Original")  # a reader of mft.model.native; people know the class below
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
    if missing := sorted(found["missing_keys"]):
        raise UserError(
            f"model.path={source} lacks the weight {missing[0]} of a {kind}{_others(missing)}: it would be trained "
            f"from random values{_defaults(source, model)}"
        )
    if unknown := sorted(found["unexpected_keys"]):
        message = f"model.path={source} has the weight {unknown[0]}, which a {kind} does not{_others(unknown)}"
        if whole:
            raise UserError(f"{message}: it would be left out")
        log.warning("%s: left out", message)


def _others(names: list[str]) -> str:
    return f", and {len(names) - 1} others" if len(names) > 1 else ""


def _mismatch(folder: Path, model: Any, wrong: tuple[str, Shape, Shape]) -> str:
    """Returns a sentence on a weight: (name, shape in the checkpoint, shape by config.json)."""
    from mft.model.native import original_names

    name, there, expected = wrong
    for file in sorted(folder.glob("*.safetensors")):
        whole = shapes(file)
        stored = original_names(type(model), whole).get(name, "")
        if stored in whole:
            it = "it" if whole[stored] == there else f"its part {name}"
            return f"{stored} in {file.name} is {list(whole[stored])}, by config.json {it} is {list(expected)}"
    return f"{name} is {list(there)}, by config.json it is {list(expected)}"


def _defaults(folder: Path, model: Any) -> str:
    """Returns a remark on sizes that config.json does not name, so that a default was taken; "" for none."""
    file = folder / "config.json"
    if not file.is_file() or type(model).__module__ == "mft.model.native":  # whose families ask for every size
        return ""
    values, config = json.loads(file.read_text(encoding="utf-8")), model.config
    names = {name: {name, config.attribute_map.get(name, name)} for name in SIZES if hasattr(config, name)}
    absent = [name for name, either in names.items() if not either & values.keys()]
    if not absent:
        return ""
    return f"; config.json has no {' and no '.join(absent)}, so the default of {type(model.config).__name__} was taken"
