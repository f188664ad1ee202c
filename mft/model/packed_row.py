"""The samples of one row, as the attention of every layer is given them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor

from mft.hardware import send


@dataclass(frozen=True)
class PackedRow:
    """Where the samples of one row of T tokens without padding begin and end; made once per micro-batch."""

    lengths: list[int]
    """Tokens of each of the N samples. Numbers, so that no layer has to wait for a device to read them."""

    cu_seqlens: Tensor
    """int32 [N + 1] on the row's device: the start of each sample, and T."""

    _chunked: dict[int, PackedRow] = field(default_factory=dict, repr=False, compare=False)

    @classmethod
    def of(cls, lengths: Sequence[int], device: torch.device) -> PackedRow:
        """Returns the row of samples of these lengths."""
        borders = torch.tensor([0, *accumulate(lengths)], dtype=torch.int32, device="cpu")
        return cls(list(lengths), send(borders, device))

    @property
    def longest(self) -> int:
        """Tokens of the longest sample."""
        return max(self.lengths)

    def chunked(self, size: int) -> PackedRow:
        """Returns the row with its samples cut into chunks of `size` tokens, which attend to themselves
        alone."""
        if size not in self._chunked:
            cut = [min(size, n - i) for n in self.lengths for i in range(0, n, size)]
            self._chunked[size] = PackedRow.of(cut, self.cu_seqlens.device)
        return self._chunked[size]

    def as_seen_by(self, module: Any) -> PackedRow:
        """Returns the row for one layer's attention, whose config may have chunks of attention in it."""
        kinds = getattr(module.config, "layer_types", None)
        if kinds and kinds[module.layer_idx] == "chunked_attention":
            return self.chunked(module.config.attention_chunk_size)
        return self

    def for_samples(self) -> dict[str, Any]:
        """Returns the arguments of a decoder's forward whose attention goes by `packed_row`.

        The 4-D mask is a stand-in: transformers passes such a mask on as it is instead of making one, and
        nothing reads it.
        """
        mask = torch.zeros((1, 1, 1, 1), dtype=torch.bool, device=self.cu_seqlens.device)
        return {"attention_mask": mask, "packed_row": self}

    def for_flash(self) -> dict[str, Any]:
        """Returns the arguments of a decoder's forward with flash attention, under the names of transformers.

        With all four it does not look for the samples in the positions, which takes four waits for the device
        in every layer.
        """
        borders = {"cu_seq_lens_q": self.cu_seqlens, "cu_seq_lens_k": self.cu_seqlens}
        return {
            "attention_mask": None,
            **borders,
            "max_length_q": self.longest,
            "max_length_k": self.longest,
        }


def per_sample(attend: Callable[..., tuple[Tensor, Any]]) -> Callable[..., tuple[Tensor, Any]]:
    """Returns `attend` (a function of transformers' interface that is causal where its mask is None) made to
    go sample by sample where it is given a `packed_row`."""

    def forward(
        module: Any,
        query: Tensor,  # [B, heads, T, head width]
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        packed_row: PackedRow | None = None,
        **arguments: Any,
    ) -> tuple[Tensor, Any]:
        if packed_row is None:
            return attend(module, query, key, value, attention_mask, **arguments)
        lengths = packed_row.as_seen_by(module).lengths
        window = arguments.get("sliding_window")
        parts = []
        # split, not slices: its backward joins the gradients at once, where each slice would make a full-size
        # one.
        for q, k, v in zip(*(tensor.split(lengths, dim=2) for tensor in (query, key, value)), strict=True):
            mask = None
            if window and q.shape[2] > window:  # the last `window` keys up to the query
                mask = causal_mask(q, k).triu(1 - window)
            parts.append(attend(module, q, k, v, mask, **arguments)[0])
        return (parts[0] if len(parts) == 1 else torch.cat(parts, dim=1)), None

    return forward


def causal_mask(query: Tensor, key: Tensor) -> Tensor:
    """Returns the mask [1, 1, queries, keys] that is True up to each query's own place."""
    shape = (1, 1, query.shape[2], key.shape[2])
    return torch.ones(shape, dtype=torch.bool, device=query.device).tril()
