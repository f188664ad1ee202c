"""Token losses of a micro-batch: hidden states, then the head and cross entropy only where a token is
trained.

The head runs inside this module, and this module is what an engine prepares: under sharding the head's weight
exists only inside the wrapped module's forward.
"""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from mft.batch import Batch
from mft.errors import UserError
from mft.model.attention import attend_per_sample, recurrent_layers
from mft.model.cross_entropy import default_chunk_size, linear_nll, module_nll
from mft.model.fused_layers import fuse_layers
from mft.model.introspect import base_of, decoder_of
from mft.model.model_folder import no_packing
from mft.model.packed_row import PackedRow
from mft.model.residual_stream import follow_autocast
from mft.model.router_loss import balance_loss
from mft.model.transformers_private import attends_by_registry, attention_name

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from mft.model.causal_lm import CausalLM


class TokenLoss(nn.Module):
    """Maps a micro-batch to its per-token losses.

    model: a transformers causal LM, plain or wrapped by peft; family: answers questions about its head;
    chunk_size: positions whose logits exist at once (default: by vocabulary and device).
    """

    def __init__(self, model: nn.Module, family: CausalLM, chunk_size: int | None = None):
        super().__init__()
        self.model = model
        self.family = family
        base = base_of(model)
        self.chunk_size = chunk_size
        self.router_coef = family.router_weight(base)
        if family.fused:
            fuse_layers(base)
        follow_autocast(base)
        self.recurrent = recurrent_layers(base)
        self.per_sample = attend_per_sample(base, fast=family.attention == "auto")
        # transformers' flash attention sees sample borders in position ids only in a batch of one row: with
        # more rows, packed samples would attend to each other without an error. As one long row the borders
        # hold everywhere.
        flash = "flash" in attention_name(base)
        self.one_row = self.per_sample or (flash and not self.recurrent)
        # What does not go through transformers' interface may not take the arguments that tell of samples.
        self.told_of_samples = self.one_row and attends_by_registry(base)
        self.apart: bool | None = True if self.one_row or self.recurrent else None  # None: not tried yet

    def forward(self, batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
        """Returns (nll_BT, router): float32 losses (float64 for a float64 model), 0 where target_BT is
        IGNORE; and the router's auxiliary loss, a scalar times its coefficient, 0 for models without one and
        for batches without a trained token.

        Padding (sample_BT < 0) must follow the last sample of its row. Both results depend on the parameters
        even when no token is trained, with zero gradient, so that every rank takes part in the exchange of
        gradients. Nothing here reads a value of the device: the host knows the layout and never waits.
        """
        base, layout = base_of(self.model), batch.layout
        # Without a mask and without a cache transformers builds the block-diagonal mask from restarting
        # positions. A mask of ones or use_cache=True would let the samples of a row see each other, silently.
        arguments: dict[str, Any] = {"attention_mask": None, "use_cache": False}
        if self.router_coef:
            arguments["output_router_logits"] = True
        # By every rank, whatever its batch holds: under sharding each forward is one of all ranks.
        if self.apart is None:
            self.apart = self._keeps_apart(base)
        if (self.recurrent or not self.apart) and layout.packed:
            raise UserError(no_packing(self.family.path, self.recurrent, type(base).__name__))
        if self.one_row:  # the samples of all rows one after the other, without padding
            ids_BT, position_BT = (
                tensor_BT.flatten().index_select(0, layout.row_m)[None]
                for tensor_BT in (batch.ids_BT, batch.position_BT)
            )
            where_n, mask_BT = layout.trained_in_row_n, None
            if self.told_of_samples:
                row = PackedRow(layout.lengths, layout.cu_seqlens)
                arguments |= row.for_samples() if self.per_sample else row.for_flash()
        else:
            ids_BT, position_BT = batch.ids_BT, trailing_positions(batch.position_BT, batch.sample_BT)
            where_n, mask_BT = layout.trained_n, (batch.sample_BT >= 0).to(torch.int64)
        outputs = decoder_of(base)(input_ids=ids_BT, position_ids=position_BT, **arguments)
        hidden_mH = outputs[0].reshape(-1, outputs[0].shape[-1])

        target_m = batch.target_BT.flatten()
        target_n = target_m.index_select(0, layout.trained_n)
        nll_n = self._nll(base, hidden_mH.index_select(0, where_n), target_n)
        nll_m = nll_n.new_zeros(len(target_m)).index_copy(0, layout.trained_n, nll_n)
        router = self._router(base, outputs, mask_BT, trained=len(where_n) > 0)
        # a copy: FSDP2 warns of views, whose hooks an operation in place would lose
        return nll_m.view(batch.target_BT.shape).clone(), router

    def direct_weights(self) -> list[nn.Parameter]:
        """Returns the weights that are read without calling their module, which ZeRO-3 must gather for it."""
        base = base_of(self.model)
        return [base.get_output_embeddings().weight] if self.family.plain_head(base) else []

    def layer_classes(self) -> list[str]:
        """Returns the class names of the decoder layers, the unit of sharding."""
        return self.family.layer_classes(self.model)

    @torch.no_grad()
    def _keeps_apart(self, base: Any) -> bool:
        """Whether this model keeps the samples of a row apart by their positions alone, which older classes
        of transformers (bloom, mpt, xglm, ...) do not, without an error: tried with two rows whose second
        samples are equal and whose first are not."""
        # Dropout would make equal samples differ.
        modes = [(module, module.training) for module in self.model.modules()]
        self.model.eval()
        embedding = base.get_input_embeddings()
        ids_BT = torch.tensor([[0, 1, 2, 6, 7, 8], [3, 4, 5, 6, 7, 8]], device=embedding.weight.device)
        position_BT = torch.tensor([0, 1, 2, 0, 1, 2], device=ids_BT.device).expand(2, -1)
        ids_BT %= vocabulary(embedding)
        arguments = {"position_ids": position_BT, "attention_mask": None, "use_cache": False}
        outputs = decoder_of(base)(input_ids=ids_BT, **arguments)
        for module, mode in modes:
            module.training = mode
        one, other = outputs[0][:, 3:].float()
        exact = outputs[0].dtype == torch.float32 and not torch.is_autocast_enabled(one.device.type)
        # By rounding tiny models differ by 1e-7 of the norm, and by 1e-2 and more where samples see each
        # other.
        return bool((one - other).norm() <= (1e-3 if exact else 2e-2) * one.norm())

    def _nll(self, base: PreTrainedModel, hidden_nH: torch.Tensor, target_n: torch.Tensor) -> torch.Tensor:
        head = base.get_output_embeddings()
        trained = any(parameter.requires_grad for parameter in head.parameters())
        size = self.chunk_size or default_chunk_size(vocabulary(head), hidden_nH.device.type, trained)
        if self.family.plain_head(base):
            return linear_nll(hidden_nH, head.weight, target_n, size)
        logits = partial(self.family.logits, self.model)
        return module_nll(logits, hidden_nH, target_n, size)

    def _router(
        self, base: PreTrainedModel, outputs: Any, mask_BT: torch.Tensor | None, trained: bool
    ) -> torch.Tensor:
        # A class with experts may be of a config without them, and hands out none.
        if not self.router_coef or not outputs.router_logits:
            return outputs[0].new_zeros((), dtype=torch.float32)
        # The step divides router losses by the number of micro-batches that have a trained token: the others
        # add nothing. Their mask may be all padding, over which the balance is 0/0, so it is not taken at
        # all.
        if not trained:
            return sum(logits.sum() for logits in outputs.router_logits).float() * 0
        return self.router_coef * balance_loss(base, outputs.router_logits, mask_BT)


def vocabulary(head: nn.Module) -> int:
    """Returns the rows of a head's weight, also where ZeRO-3 has left an empty placeholder."""
    weight = head.weight
    assert isinstance(weight, torch.Tensor)
    return int(getattr(weight, "ds_shape", weight.shape)[0])


def trailing_positions(position_BT: torch.Tensor, sample_BT: torch.Tensor) -> torch.Tensor:
    """Returns position_BT with the padding at the end of each row counting on from the row's last sample.

    Causal attention keeps what follows a sample from reaching it, so padding may ride along as that sample's
    tail. A row of one sample then needs no mask at all (2.3 times as fast an attention layer here as the
    block-diagonal mask), which a restart of the positions at the padding would ask for.
    """
    padding_BT = sample_BT < 0
    length_B1 = (~padding_BT).sum(1, keepdim=True)
    last_B1 = position_BT.gather(1, (length_B1 - 1).clamp(min=0)).masked_fill(length_B1 == 0, -1)
    return torch.where(padding_BT, last_B1 + padding_BT.cumsum(1), position_BT)
