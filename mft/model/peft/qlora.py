"""QLoRA (Dettmers et al. 2023): adapters beside a base that bitsandbytes holds in 4 or 8 bits."""

from __future__ import annotations

import logging
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar

from mft.errors import UserError, check_choice
from mft.model.peft.full import PRECISIONS
from mft.model.peft.lora import Lora
from mft.model.quantised_checkpoint import refuse_quantised

if TYPE_CHECKING:
    import torch
    from torch import nn
    from transformers import BitsAndBytesConfig

    from mft.model.causal_lm import CausalLM
    from mft.model.quantised_checkpoint import WeightFormat

log = logging.getLogger(__name__)

ALLOWED: dict[str, tuple[Any, ...]] = {
    "bits": (4, 8),
    "quant_type": ("nf4", "fp4"),
    "compute_dtype": (None, *PRECISIONS),
    "storage_dtype": (None, "uint8", *PRECISIONS),
}
"""Field → its values, for those that have a list of them."""

HEADS = ("lm_head", "embed_out", "output_layer")
"""Names of output layers in transformers."""


@dataclass
class QLora(Lora):
    """Trains adapters beside a base quantised by bitsandbytes."""

    public_name: ClassVar[str] = "qlora"

    bits: int = 4
    """Of a weight of the base: 4 or 8. quant_type, double_quant, compute_dtype and storage_dtype are for
    4."""

    quant_type: str = "nf4"
    """nf4 (levels for normally distributed weights) or fp4."""

    double_quant: bool = True
    """Quantise the scales too, which saves 0.4 bits a weight."""

    compute_dtype: str | None = None
    """bf16, fp16 or fp32: what the base computes in; None = the run's precision."""

    storage_dtype: str | None = None
    """uint8, bf16, fp16 or fp32: the dtype whose bits hold the packed weights; None = uint8, or the run's
    precision where the backend casts weights to it, which must find nothing to cast here."""

    skip_modules: list[str] = field(default_factory=list)
    """Names of modules that stay unquantised besides the head."""

    def check(self) -> None:
        super().check()
        for name, values in ALLOWED.items():
            check_choice(f"peft.{name}", getattr(self, name), values)
        if self.bits == 8 and self.use_dora:
            raise UserError(
                "peft.use_dora=true is not possible with 8-bit layers; use peft.bits=4 or peft.use_dora=false"
            )
        if self.changes_base:
            raise UserError(
                f"peft.init={self.init} would change quantised weights; use peft.init=true, or peft=lora"
            )

    def check_against(self, family: CausalLM, precision: str) -> None:
        from mft.model.meta_model import has_experts, on_meta_device

        super().check_against(family, precision)
        if (self.skip_modules or has_experts(family)) and (model := on_meta_device(family)) is not None:
            _check_skipped(model, self.skip_modules)
            _warn_of_experts(model, self.dtype(precision))

    def _check_weight_format(self, path: str, weights: WeightFormat) -> None:
        refuse_quantised(path, weights, self.bits)
        stored, kept = weights.settings, {}
        if self.skip_modules:  # [] leaves the choice to the checkpoint
            kept["skip_modules"] = stored.get("llm_int8_skip_modules") or []
        if self.bits == 4:  # defaults are those of transformers
            kept["quant_type"] = stored.get("bnb_4bit_quant_type", "fp4")
            kept["double_quant"] = stored.get("bnb_4bit_use_double_quant", False)
            if self.storage_dtype:
                kept["storage_dtype"] = _storage_of(weights)
        if weights.method and (differing := self.differing(kept)):
            log.warning("model.path=%s is quantised already and keeps its own %s", path, differing)

    def _storage(self, cast_to: str | None) -> str:
        """Returns the dtype of weights packed here, as `storage_dtype` has it."""
        return self.storage_dtype or cast_to or "uint8"

    def stored_as(self, family: CausalLM, cast_to: str | None) -> str:
        if self.bits == 8:
            return ""
        weights = family.weight_format()
        return _storage_of(weights) if weights.method else self._storage(cast_to)

    def quantization(
        self, compute_dtype: torch.dtype, cast_to: str | None = None
    ) -> BitsAndBytesConfig | None:
        """Returns the settings as transformers takes them; compute_dtype and cast_to stand in for a
        compute_dtype and a storage_dtype of null."""
        import torch
        from transformers import BitsAndBytesConfig

        # Patterns replace transformers' own list, the head, and are matched from the start of a path.
        names = (*self.skip_modules, *HEADS) if self.skip_modules else ()
        skip = [rf"(?:.*\.)?{re.escape(name)}" for name in names] or None
        if self.bits == 8:
            return BitsAndBytesConfig(load_in_8bit=True, llm_int8_skip_modules=skip)
        own = getattr(torch, PRECISIONS[self.compute_dtype]) if self.compute_dtype else compute_dtype
        storage = self._storage(cast_to)
        return BitsAndBytesConfig(
            load_in_4bit=True,
            llm_int8_skip_modules=skip,
            bnb_4bit_quant_type=self.quant_type,
            bnb_4bit_use_double_quant=self.double_quant,
            bnb_4bit_compute_dtype=own,
            bnb_4bit_quant_storage=getattr(torch, PRECISIONS.get(storage, storage)),
        )

    def attach(self, model: nn.Module, family: CausalLM) -> nn.Module:
        _check_skipped(model, self.skip_modules)
        return super().attach(model, family)


def _storage_of(weights: WeightFormat) -> str:
    """Returns the dtype that holds the 4-bit weights of a quantised checkpoint, as `storage_dtype` has it."""
    stored = str(weights.settings.get("bnb_4bit_quant_storage", "uint8")).removeprefix("torch.")
    return {name: precision for precision, name in PRECISIONS.items()}.get(stored, stored)


def _check_skipped(model: nn.Module, names: Sequence[str]) -> None:
    """Raises UserError for a name of peft.skip_modules that the model does not have."""
    from mft.model.peft.targets import adapter_sites, no_such_module

    # transformers ignores a name that matches nothing, and quantises what was to be spared.
    sites = adapter_sites(model)
    for name in names:
        if not any(f".{name}." in f".{site.path}." for site in sites):
            raise no_such_module("peft.skip_modules:", name, [site.name for site in sites])


def _warn_of_experts(model: nn.Module, dtype: torch.dtype) -> None:
    """Says what routed experts, which stay unquantised, take in `dtype`; model: also on the meta device."""
    from mft.model.peft.targets import roles, weights

    every = list(weights(model))
    role = roles({path: shape for path, _, shape in every})
    experts = sum(parameter.numel() for path, parameter, _ in every if role[path] == "experts")
    if experts:
        log.warning(
            "peft=qlora: bitsandbytes quantises linear layers only, so the routed experts, %.0f%% of all "
            "weights, stay in %s and take %.4g GiB",
            100 * experts / sum(parameter.numel() for _, parameter, _ in every),
            *(str(dtype).removeprefix("torch."), experts * dtype.itemsize / 2**30),
        )
