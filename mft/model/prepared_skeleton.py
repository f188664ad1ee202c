"""The model of a run as it is trained, on the meta device: what an estimate, a plan and a rehearsal count."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any

from mft.errors import UserError
from mft.model.meta_model import skeleton
from mft.model.peft.full import Full, compute_dtype
from mft.model.special_tokens import add_new_tokens, widen_embeddings

if TYPE_CHECKING:
    from mft.model.causal_lm import CausalLM


def prepared_skeleton(family: CausalLM, peft: Full, precision: str, cast_to: str | None) -> Any:
    """Returns the model of a family on the meta device as a run prepares it: quantised, with new tokens and
    adapters.

    cast_to: the precision that the backend casts frozen weights to, None = to none. An adapter at peft.path
    is made anew with the settings of `peft`. Raises UserError where only code of the checkpoint's own could
    build the model, or its config cannot be read.
    """
    import torch

    if family.trust_remote_code:
        raise UserError(
            "model.trust_remote_code=true: code of the checkpoint builds the model, and none of it is run for "
            "an estimate; leave it out if transformers has this architecture itself"
        )
    quantization = peft.quantization(compute_dtype(precision), cast_to)
    base = skeleton(family.config(), quantization, peft.dtype(precision))
    if family.attention == "eager":
        base.set_attn_implementation("eager")
    if family.new_tokens():
        added = add_new_tokens(family.read_tokenizer(), family.add_tokens, family.add_special_tokens)
        widen_embeddings(base, added, family.pad_to_multiple_of)
    # an initialisation that computes with the weights trains as many as any other
    plain: dict[str, Any] = {"init": True} if getattr(peft, "changes_base", False) else {}
    plain |= {"path": None} if getattr(peft, "path", None) else {}
    with torch.device("meta"):  # else peft fills each adapter with numbers
        return dataclasses.replace(peft, **plain).attach(base, family)
