"""The weights of a case, counted on the meta device: how many, which are trained, what they take, what they
compute."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

from mft.errors import UserError
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
    import torch

    from mft.model.meta_model import skeleton
    from mft.model.peft.full import compute_dtype
    from mft.model.special_tokens import add_new_tokens, widen_embeddings

    family, peft, precision = of.parts.model, of.parts.peft, of.cfg.train.precision.value
    if family.trust_remote_code:
        raise UserError(
            "model.trust_remote_code=true: code that comes with the checkpoint builds the model, and a plan "
            "runs none of it; leave it out if transformers has this architecture itself"
        )
    quantization = peft.quantization(compute_dtype(precision))
    base = skeleton(family.config(), quantization, peft.dtype(precision))
    if family.new_tokens():
        added = add_new_tokens(family.read_tokenizer(), family.add_tokens, family.add_special_tokens)
        widen_embeddings(base, added, family.pad_to_multiple_of)
    # an initialisation that computes with the weights trains as many as any other
    plain = {"init": True} if getattr(peft, "changes_base", False) else {}
    with torch.device("meta"):  # else peft fills each adapter with numbers
        model: Any = dataclasses.replace(peft, **plain).attach(base, family)
    sizes = Sizes.of(model, peft.audit(model))
    return Weights(model, family, sizes, parameter_count(model), getattr(peft, "bits", 0))
