"""Kernels of a GPU that compute the same bits every time (`train.deterministic`).

On a CPU nothing is set: what a run computes there repeats itself.
"""

from __future__ import annotations

import os

from mft.errors import UserError

WORKSPACE = {"CUBLAS_WORKSPACE_CONFIG": ":4096:8"}
"""With several streams cuBLAS otherwise chooses another kernel from time to time."""

NO_KERNEL = "does not have a deterministic implementation"
"""In torch's error for an operation that cannot repeat itself."""


def compute_deterministically(wanted: bool) -> None:
    """Lets a GPU's kernels compute the same bits every time, or not; before this rank starts CUDA.

    Attention repeats itself only where torch raises instead of warning. Memory that is not written yet is not
    filled with NaN, which costs time and finds mistakes that are not looked for here.
    """
    import torch

    if not torch.cuda.is_available() or wanted == torch.are_deterministic_algorithms_enabled():
        return
    if wanted:
        os.environ |= {name: os.environ.get(name, value) for name, value in WORKSPACE.items()}
        os.environ.setdefault("FLASH_ATTENTION_DETERMINISTIC", "1")  # transformers hands it to flash-attn
    torch.use_deterministic_algorithms(wanted)
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]


def explain(error: BaseException) -> UserError | None:
    """Returns the sentence for an operation without such a kernel, None for any other error."""
    if not (isinstance(error, RuntimeError) and NO_KERNEL in str(error)):
        return None
    operation = str(error).split(NO_KERNEL)[0].strip()
    return UserError(
        f"train.deterministic=true: on this GPU {operation} computes other bits every time; choose false, or "
        "another setting that does without it, such as model.attention=sdpa"
    )
