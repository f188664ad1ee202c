"""Checkpoints quantised in the ways that are read, made in plain code from a folder of plain weights.

Each writer returns the values that the numbers on disk stand for, by the name that the model has for them.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

Weights = dict[str, torch.Tensor]

E2M1 = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6])


def write(plain: Path, out: Path, weights: Weights, settings: dict[str, Any] | None, **values: Any) -> None:
    """Writes a copy of the folder `plain` with other weights; settings: its quantization_config; values:
    others of config.json."""
    shutil.copytree(plain, out)
    whole = {name: tensor.clone().contiguous() for name, tensor in weights.items()}
    save_file(whole, out / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((out / "config.json").read_text()) | values
    (out / "config.json").write_text(
        json.dumps(config | ({"quantization_config": settings} if settings else {}))
    )


def rewritten(plain: Path, change: Callable[[str, torch.Tensor], Weights]) -> Weights:
    """Returns the weights of a folder, each linear layer's replaced by what `change` makes of it."""
    found: Weights = {}
    for name, tensor in load_file(plain / "model.safetensors").items():
        found |= change(name, tensor) if name.endswith("_proj.weight") else {name: tensor}
    return found


def fp8(plain: Path, out: Path, rows: int = 32, columns: int = 32, **settings: Any) -> Weights:
    """Blocks of rows x columns with a scale each."""
    true: Weights = {}

    def change(name: str, tensor: torch.Tensor) -> Weights:
        blocks = tensor.unflatten(0, (-1, rows)).unflatten(2, (-1, columns))  # [R, rows, C, columns]
        scale = blocks.abs().amax((1, 3), keepdim=True) / 448
        packed = (blocks / scale).to(torch.float8_e4m3fn)
        true[name] = (packed.float() * scale).reshape(tensor.shape)
        return {name: packed.reshape(tensor.shape), f"{name}_scale_inv": scale.squeeze(3).squeeze(1)}

    found = rewritten(plain, change)
    given = {"quant_method": "fp8", "activation_scheme": "dynamic", "weight_block_size": [rows, columns]}
    write(plain, out, found, given | settings)
    return load_file(plain / "model.safetensors") | true


def fp8_whole(plain: Path, out: Path) -> Weights:
    """One scale for each weight, and one for its inputs."""
    true: Weights = {}

    def change(name: str, tensor: torch.Tensor) -> Weights:
        scale = tensor.abs().max() / 448
        packed = (tensor / scale).to(torch.float8_e4m3fn)
        true[name] = packed.float() * scale
        activation = f"{name.removesuffix('weight')}activation_scale"
        return {name: packed, f"{name}_scale_inv": scale, activation: torch.tensor(0.5)}

    settings = {"quant_method": "fp8", "activation_scheme": "static", "weight_block_size": None}
    write(plain, out, rewritten(plain, change), settings)
    return load_file(plain / "model.safetensors") | true


def mxfp8(plain: Path, out: Path) -> Weights:
    """Groups of 32 with a power of two each, in a byte."""
    true: Weights = {}

    def change(name: str, tensor: torch.Tensor) -> Weights:
        groups = tensor.unflatten(1, (-1, 32))
        power = (groups.abs().amax(2, keepdim=True) / 448).log2().ceil()
        packed = (groups / 2**power).to(torch.float8_e4m3fn)
        true[name] = (packed.float() * 2**power).reshape(tensor.shape)
        return {
            name: packed.reshape(tensor.shape),
            f"{name}_scale_inv": (power.squeeze(2) + 127).to(torch.uint8),
        }

    settings = {"quant_method": "mxfp8", "weight_block_size": [1, 32], "scale_fmt": "ue8m0"}
    write(plain, out, rewritten(plain, change), settings)
    return load_file(plain / "model.safetensors") | true


def mxfp4(plain: Path, out: Path) -> Weights:
    """The experts of a gpt_oss as it is released."""
    found: Weights = {}
    true: Weights = {}
    for name, tensor in load_file(plain / "model.safetensors").items():
        if not name.endswith(("experts.gate_up_proj", "experts.down_proj")):
            found[name] = true[name] = tensor
            continue
        groups = tensor.transpose(1, 2).unflatten(2, (-1, 32))  # [experts, out, in / 32, 32]
        power = (groups.abs().amax(3, keepdim=True) / 6).log2().ceil()
        index = ((groups / 2**power)[..., None] - E2M1).abs().argmin(-1)
        found[f"{name}_blocks"] = (index[..., 0::2] | index[..., 1::2] << 4).to(torch.uint8)
        found[f"{name}_scales"] = (power.squeeze(3) + 127).to(torch.uint8)
        true[name] = (E2M1[index] * 2**power).flatten(2).transpose(1, 2)
    write(plain, out, found, {"quant_method": "mxfp4"})
    return true


def bnb(plain: Path, out: Path, bits: int, **settings: Any) -> Weights:
    """As bitsandbytes and transformers write it; its values by bitsandbytes' own dequantisation."""
    config = BitsAndBytesConfig(load_in_4bit=bits == 4, load_in_8bit=bits == 8, **settings)
    shutil.copytree(plain, out)
    model = AutoModelForCausalLM.from_pretrained(plain, quantization_config=config, dtype=torch.float32)
    model.save_pretrained(out)
    return dict(model.dequantize(torch.float32).state_dict())


def bnb4(plain: Path, out: Path) -> Weights:
    return bnb(plain, out, 4, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True)


def bnb8(plain: Path, out: Path) -> Weights:
    return bnb(plain, out, 8)
