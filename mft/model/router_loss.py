"""The auxiliary loss of a mixture of experts' router, which keeps the experts equally busy.

It is the loss of the Switch Transformer (Fedus et al. 2021, Eq. 4 to 6), as transformers computes it: with E
experts, f_e the assignments of expert e per token and P_e the mean of softmax(router logits)_e, E * sum_e f_e
P_e. Families whose classes in transformers hand out router logits and have no such loss (DeepSeek V2 and V3,
Llama 4, GLM 4 MoE, ...) get the same one. Those that route by sigmoid pick the same experts by it, up to
their bias and groups; the bias by which DeepSeek V3 balances itself is not trained in transformers.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from mft.model.introspect import decoder_of
from mft.model.transformers_private import recorded_outputs

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel

COEFFICIENTS = ("router_aux_loss_coef", "aux_loss_alpha", "aux_loss_coef")
"""What configs call the coefficient: most families, DeepSeek, JetMoe."""


def routed(base: PreTrainedModel) -> bool:
    """Whether the decoder of this causal LM hands out the logits of its routers."""
    recorded = recorded_outputs(decoder_of(base))
    return "router_logits" in recorded or _own_loss(base) is not None


def coefficient(base: PreTrainedModel) -> float:
    """Returns the coefficient in the model's config, 0 where it has none."""
    for name in COEFFICIENTS:
        if (value := getattr(base.config.get_text_config(), name, None)) is not None:
            return float(value)
    return 0.0


def balance_loss(
    base: PreTrainedModel, logits: tuple[torch.Tensor, ...], mask_BT: torch.Tensor | None
) -> torch.Tensor:
    """Returns the scalar auxiliary loss, without its coefficient, of the tokens where mask_BT is 1 (None: of
    all).

    logits: [B * T, E] of every layer with experts.
    """
    from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func

    function: Callable[..., Any] = _own_loss(base) or load_balancing_loss_func
    per_token = getattr(base, "num_experts_per_tok", None)
    per_token = per_token or base.config.get_text_config().num_experts_per_tok
    loss: torch.Tensor = function(logits, logits[0].shape[-1], per_token, mask_BT)
    return loss


def _own_loss(base: PreTrainedModel) -> Callable[..., Any] | None:
    return getattr(sys.modules[type(base).__module__], "load_balancing_loss_func", None)
