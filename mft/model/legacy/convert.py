"""Writes the native folder of an original checkpoint: config and weights, file by file.

One weight file is in memory at a time, so a checkpoint of any size is converted in what its largest file
takes.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import TYPE_CHECKING

from mft.errors import UserError
from mft.files.disk import free_bytes
from mft.model.legacy.layout import Layout, check_weights
from mft.model.safetensors_header import INDEX, check_files, stored_tensors, weight_files
from mft.model.save import finish_config
from mft.model.transformers_private import model_class
from mft.model.weights import is_former_buffer

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedConfig

MARGIN = 64 << 20
"""Bytes that are to be left free beside the weights, for config and tokenizer."""


def write_native(
    who: str,
    source: Path,
    config: PreTrainedConfig,
    layout: Layout,
    folder: Path,
    norm_head: bool,
    plain_head: bool,
) -> None:
    """Writes config and weights natively, the weights in the dtype they have, into an empty folder.

    who: begins sentences about the checkpoint, model.path=…; source: where its weight files lie; config: its
    config, translated for transformers; norm_head: whether its output layer scales its rows to length 1
    (Baichuan 2); plain_head: scale them once, which makes it a plain layer, else config.json says what it is,
    and it stays trainable as such. Raises UserError for weights that are not those of the config.
    """
    import torch
    from safetensors import safe_open
    from safetensors.torch import save_file

    from mft.model.legacy.native import NORM_HEAD

    # All of it before the first weight is written: converting takes minutes, and what it needs on the disk.
    check_files(source)
    files, stored = weight_files(source), stored_tensors(source)
    needed, free = sum(file.stat().st_size for file in files) + MARGIN, free_bytes(folder)
    if free < needed:
        raise UserError(
            f"{who} is in an original format: its native folder takes {needed / 2**30:.2f} GiB in "
            f"{folder.parent}, where {free / 2**30:.2f} GiB are free; make room, or set cache_dir=… (of mft "
            "convert: out=…)"
        )
    with torch.device("meta"):  # not from_config, which under ZeRO-3 divides the model over ranks
        model = model_class(config)(config)
    check_weights(who, layout, stored, model)

    file_of: dict[str, str] = {}
    size, dtype = 0, None
    for file in files:
        written: dict[str, torch.Tensor] = {}
        with safe_open(str(file), "pt") as weights:
            for name in weights.keys():  # noqa: SIM118  (not a mapping)
                if is_former_buffer(name, stored[name][1].shape):
                    continue
                weight, native = weights.get_tensor(name), layout.native_names(name)
                if norm_head and plain_head and native == ["lm_head.weight"]:
                    weight = torch.nn.functional.normalize(weight)
                parts = layout.split(weight, config) if len(native) > 1 else [weight]
                written |= zip(native, parts, strict=True)
        save_file(written, folder / file.name, metadata={"format": "pt"})
        file_of |= dict.fromkeys(written, file.name)
        size += sum(weight.nbytes for weight in written.values())
        floats = [weight.dtype for weight in written.values() if weight.is_floating_point()]
        # the config names one dtype: that of the first weight
        dtype = dtype or next(iter(floats), None)
    write_index(folder, file_of, size)

    config.architectures, config.dtype = [type(model).__name__], dtype
    config.save_pretrained(folder)
    finish_config(folder, {NORM_HEAD: True} if norm_head and not plain_head else {})
    generation = source / "generation_config.json"
    if generation.is_file():
        shutil.copyfile(generation, folder / generation.name)
    elif plain_head:
        model.generation_config.save_pretrained(folder)


def write_index(folder: Path, file_of: dict[str, str], size: int) -> list[Path]:
    """Writes the index of several weight files, and returns its path; nothing for a single file, which needs
    none. size: bytes of all weights."""
    if set(file_of.values()) == {"model.safetensors"}:
        return []
    values = {"metadata": {"total_size": size}, "weight_map": file_of}
    (folder / INDEX).write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")
    return [folder / INDEX]
