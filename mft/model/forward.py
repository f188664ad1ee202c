"""Token losses of a micro-batch: hidden states, then the head and cross entropy only where a token is trained.

The head runs inside this module, and this module is what an engine prepares: under sharding the head's weight exists
only inside the wrapped module's forward.
"""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from mft.batch import IGNORE
from mft.model.cross_entropy import chunk_rows, linear_nll, module_nll
from mft.model.parts import base_of

if TYPE_CHECKING:
    from mft.model.family import CausalLM


class TokenLoss(nn.Module):
    """Maps a micro-batch to its per-token losses.

    model: a transformers causal LM, plain or wrapped by peft; family: answers questions about its head;
    rows: positions per chunk of logits (default: by vocabulary).
    """

    def __init__(self, model: nn.Module, family: CausalLM, rows: int | None = None):
        super().__init__()
        self.model = model
        self.family = family
        base = base_of(model)
        self.rows = rows or chunk_rows(base.get_output_embeddings().weight.shape[0])
        self.router_coef = family.router_weight(base)
        # transformers' flash attention sees sample borders in position ids only in a batch of one row: with more rows,
        # packed samples would attend to each other without an error. As one long row the borders hold everywhere.
        self.one_row = "flash" in (getattr(base.config, "_attn_implementation", None) or "")

    def forward(
        self, ids_BT: torch.Tensor, target_BT: torch.Tensor, position_BT: torch.Tensor, sample_BT: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Returns (nll_BT, router): float32 losses (float64 for a float64 model), 0 where target_BT is IGNORE; and the
        router's auxiliary loss, a scalar times its coefficient, 0 for models without one and for batches without a
        trained token.

        Padding (sample_BT < 0) must follow the last sample of its row. Both results depend on the parameters even when
        no token is trained, with zero gradient, so that every rank takes part in the exchange of gradients.
        """
        base = base_of(self.model)
        shape = ids_BT.shape
        position_BT = trailing_positions(position_BT, sample_BT)
        if self.one_row:
            ids_BT, position_BT = ids_BT.reshape(1, -1), position_BT.reshape(1, -1)
        router_logits = {"output_router_logits": True} if self.router_coef else {}
        # Without a mask and without a cache transformers builds the block-diagonal mask from restarting positions. A
        # mask of ones or use_cache=True would let the samples of a row see each other, silently.
        outputs = base.get_decoder()(
            input_ids=ids_BT, attention_mask=None, position_ids=position_BT, use_cache=False, **router_logits
        )
        hidden_BTH = outputs[0]

        target_BT = target_BT.reshape(-1)
        where_n = (target_BT != IGNORE).nonzero().squeeze(-1)
        hidden_nH = hidden_BTH.reshape(-1, hidden_BTH.shape[-1]).index_select(0, where_n)
        nll_n = self._nll(base, hidden_nH, target_BT[where_n])
        nll_BT = nll_n.new_zeros(target_BT.shape).index_put((where_n,), nll_n).view(shape)
        return nll_BT, self._router(base, outputs, sample_BT, trained=len(where_n) > 0)

    def _nll(self, base: Any, hidden_nH: torch.Tensor, target_n: torch.Tensor) -> torch.Tensor:
        head = base.get_output_embeddings()
        if self.family.plain_head(base):
            return linear_nll(hidden_nH, head.weight, target_n, self.rows)
        return module_nll(lambda hidden_rH: self.family.logits(self.model, hidden_rH), hidden_nH, target_n, self.rows)

    def _router(self, base: Any, outputs: Any, sample_BT: torch.Tensor, trained: bool) -> torch.Tensor:
        if not self.router_coef:
            return outputs[0].new_zeros((), dtype=torch.float32)
        # The step divides router losses by the number of micro-batches that have a trained token: the others add
        # nothing. Their mask may be all padding, over which the balance is 0/0, so it is not taken at all.
        if not trained:
            return sum(logits.sum() for logits in outputs.router_logits).float() * 0
        balance = sys.modules[type(base).__module__].load_balancing_loss_func
        mask_BT = (sample_BT >= 0).to(torch.int64)
        return self.router_coef * balance(outputs.router_logits, base.num_experts, base.num_experts_per_tok, mask_BT)


def trailing_positions(position_BT: torch.Tensor, sample_BT: torch.Tensor) -> torch.Tensor:
    """Returns position_BT with the padding at the end of each row counting on from the row's last sample.

    Causal attention keeps what follows a sample from reaching it, so padding may ride along as that sample's tail. A
    row of one sample then needs no mask at all (2.3 times as fast an attention layer here as the block-diagonal mask),
    which a restart of the positions at the padding would ask for.
    """
    padding_BT = sample_BT < 0
    length_B1 = (~padding_BT).sum(1, keepdim=True)
    last_B1 = position_BT.gather(1, (length_B1 - 1).clamp(min=0)).masked_fill(length_B1 == 0, -1)
    return torch.where(padding_BT, last_B1 + padding_BT.cumsum(1), position_BT)
