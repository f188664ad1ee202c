"""What a composed config needs of the machine: ability → the setting that needs it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

from mft.config.schema import resolve_precision
from mft.hardware import visible_gpus

ALWAYS = ("torch", "transformers", "peft", "accelerate")
"""Libraries that every run imports."""


@dataclass(frozen=True)
class Needs:
    """What a config needs. Empty where no config could be composed."""

    by: Mapping[str, str] = field(default_factory=dict)
    """Name of an ability → the setting that needs it, e.g. {"deepspeed": "dist=zero2"}."""

    def of(self, ability: str) -> str:
        """Returns the setting that needs an ability, "" for none."""
        return self.by.get(ability, "")


def needs_of(cfg: DictConfig) -> Needs:
    """Returns what a composed config needs; nothing is imported or read for it."""

    def class_of(node: str) -> str:
        return str(OmegaConf.select(cfg, f"{node}._target_", default="")).rpartition(".")[2]

    by: dict[str, str] = dict.fromkeys(ALWAYS, "every run")
    dist, peft = class_of("dist"), class_of("peft")
    if dist in ("Zero2", "Zero3"):
        by["deepspeed"] = f"dist={dist.lower()}"
    if dist == "Fsdp":
        by["fsdp"] = "dist=fsdp"
    if peft == "QLora":
        bits = OmegaConf.select(cfg, "peft.bits", default=4)
        by["4 bits" if bits == 4 else "8 bits"] = by["bitsandbytes"] = f"peft=qlora with {bits} bits"
    if class_of("optimizer") == "AdamW8bit":
        by["bitsandbytes"] = by["adamw8bit"] = "optimizer=adamw8bit"
    if str(cfg.model.get("attention")) == "flash_attention_2":
        by["flash-attn"] = "model.attention=flash_attention_2"
    precision = resolve_precision(cfg.train.precision)
    by[precision.value] = f"train.precision={cfg.train.precision}"
    if any(class_of(f"tracking.{name}") == "Mlflow" for name in cfg.tracking):
        by["mlflow"] = "tracking=mlflow"
    if cfg.launch.mode == "processes":
        by["fork server"] = "launch=processes"
    ranks = _ranks(cfg.launch)
    if dist != "Single" and ranks > 1:
        by["gloo"] = f"{ranks} ranks"
        by["nccl"] = f"{ranks} ranks on GPUs"
    path = OmegaConf.select(cfg, "model.path", default=None, throw_on_missing=False)
    if path and not Path(path).expanduser().is_dir():
        by["hub"] = f"model.path={path}"
    if cfg.launch.nnodes > 1:
        by["host name"] = by["port"] = f"launch.nnodes={cfg.launch.nnodes}"
    return Needs(by)


def _ranks(launch: Any) -> int:
    nproc = launch.nproc
    each = visible_gpus() if str(nproc) == "auto" else int(nproc) if str(nproc).isdigit() else 1
    return max(1, each) * int(launch.nnodes)
