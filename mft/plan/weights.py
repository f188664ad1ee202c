"""The weights of a case, counted on the meta device: how many, which are trained, what they take, what they
compute."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

from mft.estimate.memory import Sizes
from mft.model.introspect import parameter_count
from mft.plan.case import Case

if TYPE_CHECKING:
    from torch import nn

    from mft.model.causal_lm import CausalLM
    from mft.model.flops import TokenFlops


@dataclass(frozen=True)
class Weights:
    """Of a model with what is trained in it, which exists on the meta device alone."""

    model: nn.Module
    family: CausalLM
    sizes: Sizes
    total: int
    """Weights of the base, with new tokens, and of adapters."""
    packed: int
    """Bits of a weight that is quantised, 0: none is."""

    @cached_property
    def classes(self) -> list[str]:
        """Names of the decoder layers' classes."""
        return self.family.layer_classes(self.model)

    def flops(self, every: int) -> TokenFlops:
        """Returns the matrix work of a token; every: of so many layers one is recomputed, 0 = none."""
        from mft.model.flops import token_flops

        return token_flops(self.model, self.classes, every)


def weights(of: Case) -> Weights:
    """Returns the weights of a case; raises UserError for a model that only its own code can build."""
    from mft.model.prepared_skeleton import prepared_skeleton

    family, peft, precision = of.parts.model, of.parts.peft, of.cfg.train.precision.value
    model = prepared_skeleton(family, peft, precision, of.parts.dist.casts_weights_to(precision))
    sizes = Sizes.of(model, peft.audit(model))
    return Weights(model, family, sizes, parameter_count(model), getattr(peft, "bits", 0))
