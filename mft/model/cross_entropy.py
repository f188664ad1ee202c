"""Cross entropy of selected positions in chunks, so that the logits of a full batch never exist.

Legend: n positions that carry loss, H hidden width, V vocabulary. Losses are float32 (float64 for a float64
model); the matrix products run in the compute dtype, the log-softmax never does.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch.autograd.function import once_differentiable
from torch.utils.checkpoint import checkpoint


def default_chunk_size(vocabulary: int, device: str, trained: bool) -> int:
    """Returns the positions of one chunk: enough to keep the matrix product busy.

    device: a torch device type; trained: whether the head has a gradient, to the whole of which each chunk
    adds. On a CPU about 2**25 logits (128 MiB in float32) if it has and 2**23, which stay nearer to the
    cache, if not, 128 to 1,024 positions; on a GPU 2**28 (1 GiB), at least 256: there 261 positions of a
    vocabulary of 128 k would be bound by memory traffic.
    """
    if device == "cpu":
        return max(128, min(1024, 2 ** (25 if trained else 23) // vocabulary))
    return max(256, 2**28 // vocabulary)


def linear_nll(
    hidden_nH: torch.Tensor, weight_VH: torch.Tensor, target_n: torch.Tensor, chunk_size: int
) -> torch.Tensor:
    """Returns -log p(target) [n] under the logits `hidden @ weight.T`, differentiable in both; n may be 0.

    With a frozen weight the gradient of every row is made in the forward pass, where its logits are at hand,
    and backward only scales it. A trainable weight needs the scale of each row first, so its logits are made
    again in backward.
    """
    return _LinearNll.apply(hidden_nH, weight_VH, target_n, chunk_size, product_dtype(hidden_nH, weight_VH))


def product_dtype(hidden_nH: torch.Tensor, weight_VH: torch.Tensor) -> torch.dtype:
    """Returns the dtype of the head's matrix product: autocast's where it is on (it leaves float64 alone),
    else the operands'."""
    kind = hidden_nH.device.type
    dtype = torch.promote_types(hidden_nH.dtype, weight_VH.dtype)
    if torch.is_autocast_enabled(kind) and dtype != torch.float64:
        return torch.get_autocast_dtype(kind)
    return dtype


def module_nll(
    logits: Callable[[torch.Tensor], torch.Tensor],
    hidden_nH: torch.Tensor,
    target_n: torch.Tensor,
    chunk_size: int,
) -> torch.Tensor:
    """Returns -log p(target) [n] for any head: `logits` maps [rows, H] to [rows, V] and runs again in
    backward; n may be 0."""

    def one(hidden_rH: torch.Tensor, target_r: torch.Tensor) -> torch.Tensor:
        logits_rV = logits(hidden_rH)
        return F.cross_entropy(logits_rV.to(_exact(logits_rV.dtype)), target_r, reduction="none")

    # max(n, 1): a batch without a trained token still runs the head once, on no rows, so that its parameters
    # get a zero gradient (DDP waits for every parameter of every rank).
    parts = [
        checkpoint(one, hidden_nH[i : i + chunk_size], target_n[i : i + chunk_size], use_reentrant=False)
        for i in range(0, max(len(target_n), 1), chunk_size)
    ]
    return torch.cat(parts)


def _exact(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def _logits(hidden_rH: torch.Tensor, weight_VH: torch.Tensor) -> torch.Tensor:
    logits_rV = hidden_rH.to(weight_VH.dtype) @ weight_VH.T
    return logits_rV.to(_exact(logits_rV.dtype))


def _exponentials(logits_rV: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Overwrites logits with exp(logit - largest of its row); returns (their sums, the logsumexp), [r, 1]
    each. The one pass of exponentials serves the loss and its gradient."""
    largest_r1 = logits_rV.amax(-1, keepdim=True)
    sum_r1 = logits_rV.sub_(largest_r1).exp_().sum(-1, keepdim=True)
    return sum_r1, sum_r1.log() + largest_r1


def _less_one_hot(probability_rV: torch.Tensor, target_r: torch.Tensor) -> torch.Tensor:
    """Returns softmax - one-hot, the gradient of each row's loss in its logits; overwrites the softmax."""
    probability_rV[torch.arange(len(target_r), device=target_r.device), target_r] -= 1
    return probability_rV


class _LinearNll(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden_nH, weight_VH, target_n, chunk_size, dtype):  # type: ignore[no-untyped-def]
        wants_hidden, wants_weight = ctx.needs_input_grad[:2]
        with torch.autocast(hidden_nH.device.type, enabled=False):
            weight = weight_VH.to(dtype)
            nll_n = hidden_nH.new_empty(len(target_n), dtype=_exact(dtype))
            logsumexp_n = torch.empty_like(nll_n)
            early = wants_hidden and not wants_weight
            grad_nH = torch.empty_like(hidden_nH) if early else None
            for i in range(0, len(target_n), chunk_size):
                part = slice(i, i + chunk_size)
                target_r = target_n[part]
                logits_rV = _logits(hidden_nH[part], weight)
                target_r1 = logits_rV.gather(-1, target_r[:, None])
                sum_r1, logsumexp_r1 = _exponentials(logits_rV)
                logsumexp_n[part] = logsumexp_r1[:, 0]
                nll_n[part] = (logsumexp_r1 - target_r1)[:, 0]
                if grad_nH is not None:
                    residual_rV = _less_one_hot(logits_rV.div_(sum_r1), target_r)
                    grad_nH[part] = residual_rV.to(dtype) @ weight
        if grad_nH is not None:
            ctx.save_for_backward(grad_nH)
        elif wants_weight:
            ctx.save_for_backward(hidden_nH, weight_VH, target_n, logsumexp_n)
            ctx.chunk_size, ctx.dtype = chunk_size, dtype
        return nll_n

    @staticmethod
    @once_differentiable
    def backward(ctx, scale_n):  # type: ignore[no-untyped-def]
        if len(ctx.saved_tensors) == 1:
            (grad_nH,) = ctx.saved_tensors
            return (grad_nH * scale_n[:, None]).to(grad_nH.dtype), None, None, None, None
        hidden_nH, weight_VH, target_n, logsumexp_n = ctx.saved_tensors
        weight = weight_VH.to(ctx.dtype)
        grad_nH = torch.empty_like(hidden_nH) if ctx.needs_input_grad[0] else None
        # Chunks are summed in float32 at least: a half-precision sum over many chunks loses the small ones.
        grad_VH = torch.zeros_like(weight_VH, dtype=_exact(weight_VH.dtype))
        for i in range(0, len(target_n), ctx.chunk_size):
            part = slice(i, i + ctx.chunk_size)
            hidden_rH, scale_r1 = hidden_nH[part].to(ctx.dtype), scale_n[part, None]
            logits_rV = _logits(hidden_rH, weight)
            probability_rV = logits_rV.sub_(logsumexp_n[part, None]).exp_()
            residual_rV = _less_one_hot(probability_rV, target_n[part]).to(ctx.dtype)
            if grad_nH is not None:
                grad_nH[part] = (residual_rV @ weight) * scale_r1
            grad_VH += residual_rV.T @ (hidden_rH * scale_r1).to(ctx.dtype)
        return grad_nH, grad_VH.to(weight_VH.dtype), None, None, None
