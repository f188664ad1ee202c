"""Writes the native folder of an original checkpoint: config, weights file by file, tokenizer.

One weight file is in memory at a time, so a checkpoint of any size is converted in what its largest file
takes.
"""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mft.errors import UserError
from mft.model.legacy.layout import Layout, check_weights
from mft.model.safetensors_header import INDEX, check_files, tensors, weight_files
from mft.model.save import finish_config
from mft.model.transformers_private import model_class
from mft.model.weights import is_former_buffer

if TYPE_CHECKING:
    import torch

MARGIN = 64 << 20
"""Bytes that are to be left free beside the weights, for config and tokenizer."""


@dataclass(frozen=True)
class OriginalWeights:
    """An original checkpoint, ready to be converted."""

    who: str
    """Begins sentences about it: model.path=…"""

    folder: Path
    """Where config.json and the weight files lie."""

    config: Any
    """Its config, translated for transformers."""

    layout: Layout
    norm_head: bool
    """Whether its output layer scales its rows to length 1 (Baichuan 2)."""


def _check_space(who: str, files: list[Path], folder: Path) -> None:
    needed, free = sum(file.stat().st_size for file in files) + MARGIN, shutil.disk_usage(folder).free
    if free < needed:
        raise UserError(
            f"{who} is in an original format: its native folder takes {needed / 2**30:.2f} GiB in "
            f"{folder.parent}, where {free / 2**30:.2f} GiB are free. Make room, or choose another place: "
            "cache_dir=…, or out=… of mft convert"
        )


def write_native(checkpoint: OriginalWeights, folder: Path, plain_head: bool) -> None:
    """Writes config and weights natively, the weights in the dtype they have, into an empty folder.

    plain_head: scale the rows of a normalising output layer once, which makes it a plain one; else
    config.json says what it is, and it stays trainable as such. Raises UserError for weights that are not
    those of the config.
    """
    import torch
    from safetensors import safe_open
    from safetensors.torch import save_file

    from mft.model.legacy.native import NORM_HEAD

    source, config, layout = checkpoint.folder, checkpoint.config, checkpoint.layout
    check_files(source)
    files = weight_files(source)
    _check_space(checkpoint.who, files, folder)
    stored = {name: (file.name, tensor) for file in files for name, tensor in tensors(file).items()}
    with torch.device("meta"):  # not from_config, which under ZeRO-3 divides the model over ranks
        model = model_class(config)(config)
    check_weights(checkpoint.who, layout, stored, model)

    where: dict[str, str] = {}
    size, dtype = 0, None
    for file in files:
        written: dict[str, torch.Tensor] = {}
        with safe_open(str(file), "pt") as weights:
            for name in weights.keys():  # noqa: SIM118  (not a mapping)
                if is_former_buffer(name, stored[name][1].shape):
                    continue
                weight, native = weights.get_tensor(name), layout.native_names(name)
                if checkpoint.norm_head and plain_head and native == ["lm_head.weight"]:
                    weight = torch.nn.functional.normalize(weight)
                written |= zip(
                    native, layout.split(weight, config) if len(native) > 1 else [weight], strict=True
                )
        save_file(written, folder / file.name, metadata={"format": "pt"})
        where |= dict.fromkeys(written, file.name)
        size += sum(weight.nbytes for weight in written.values())
        dtype = dtype or next(
            (weight.dtype for weight in written.values() if weight.is_floating_point()), None
        )
    if set(where.values()) != {"model.safetensors"}:
        index = {"metadata": {"total_size": size}, "weight_map": where}
        (folder / INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")

    config.architectures, config.dtype = [type(model).__name__], dtype
    config.save_pretrained(folder)
    finish_config(folder, {NORM_HEAD: True} if checkpoint.norm_head and not plain_head else {})
    generation = source / "generation_config.json"
    if generation.is_file():
        shutil.copyfile(generation, folder / generation.name)
    elif plain_head:
        model.generation_config.save_pretrained(folder)
