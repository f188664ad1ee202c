"""Full fine-tuning, and the contract of a `peft` mode: what of a model is trained and how its base is
loaded."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

from mft.model.quantised_checkpoint import refuse_quantised

if TYPE_CHECKING:
    import torch
    from torch import nn
    from transformers import BitsAndBytesConfig

    from mft.model.causal_lm import CausalLM
    from mft.model.peft.summary import AuditRow
    from mft.model.quantised_checkpoint import WeightFormat

PRECISIONS = {"bf16": "bfloat16", "fp16": "float16", "fp32": "float32"}
"""A precision as users write it → its name in torch."""


def compute_dtype(precision: str) -> torch.dtype:
    """Returns the torch dtype that a run of precision bf16, fp16 or fp32 computes in."""
    import torch

    return getattr(torch, PRECISIONS[precision])


@dataclass
class Full:
    """Trains every parameter. The weights are float32 in every precision: bf16 cannot hold an update of
    1e-5 of its value."""

    public_name: ClassVar[str] = "full"

    default_lr: ClassVar[float] = 1e-5
    """Learning rate where optimizer.lr is null."""

    default_checkpoint_limit: ClassVar[int | None] = 3
    """Checkpoints kept beside the best one (None = all). With AdamW a full one holds 16 bytes a parameter."""

    @property
    def full_weights_reason(self) -> str:
        """The setting that makes `attach` read the base's weights, "" for none. Backends that shard the
        weights before `attach` refuse it."""
        return ""

    def files(self) -> list[Path]:
        """Returns the files that are read beside the base model."""
        return []

    def check(self) -> None:
        """Raises UserError for values that no model can take."""

    def check_against(self, family: CausalLM, precision: str) -> None:
        """Raises UserError for settings that the model cannot meet, as far as its config.json tells; loads no
        weights. precision: bf16, fp16 or fp32."""
        from mft.model.meta_model import on_meta_device

        if family.router_coef and (model := on_meta_device(family)) is not None:
            family.router_weight(model)
        if family.path and Path(family.path).expanduser().is_dir():  # a hub name is judged when it is loaded
            self._check_weight_format(family.path, family.weight_format())

    def _check_weight_format(self, path: str, weights: WeightFormat) -> None:
        refuse_quantised(path, weights, bits=0)

    def dtype(self, precision: str) -> torch.dtype:
        """Returns the dtype of the base weights; precision: bf16, fp16 or fp32."""
        return compute_dtype("fp32")

    def quantization(
        self, compute_dtype: torch.dtype, cast_to: str | None = None
    ) -> BitsAndBytesConfig | None:
        """Returns how the base is quantised on loading, or None.

        compute_dtype: the run's; cast_to: the precision that the backend casts weights to, None = to none.
        """
        return None

    def stored_as(self, family: CausalLM, cast_to: str | None) -> str:
        """Returns the dtype that holds packed 4-bit weights (uint8, bf16, fp16, fp32, or another one of the
        checkpoint's), "" where there are none. cast_to: see `quantization`."""
        return ""

    def attach(self, model: nn.Module, family: CausalLM) -> nn.Module:
        """Returns the model with what is to be trained requiring gradients."""
        return model.requires_grad_(True)

    def computation(self, model: nn.Module) -> str:
        """Returns how what is attached to a model is computed, for people, "" where nothing is."""
        return ""

    def audit(self, model: nn.Module) -> list[AuditRow]:
        """Returns what is trained, a row per kind of module."""
        from mft.model.peft.summary import audit

        return audit(model)
