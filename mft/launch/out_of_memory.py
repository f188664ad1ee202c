"""When memory runs out: which settings to lower, and what they are now."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from mft.errors import UserError

SIGNS = (
    "can't allocate memory",  # torch's CPU allocator
    "not enough memory",
    "out of memory",  # CUDA, where it is not raised as OutOfMemoryError
    "CUBLAS_STATUS_ALLOC_FAILED",
)
"""Texts of a RuntimeError that mean memory."""


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error, or what caused it, says that the memory of the machine or of a GPU ran out."""
    link: BaseException | None = error
    while link is not None:
        if isinstance(link, MemoryError) or type(link).__name__ == "OutOfMemoryError":
            return True
        if isinstance(link, RuntimeError) and any(sign in str(link) for sign in SIGNS):
            return True
        link = link.__cause__
    return False


def explain(error: BaseException, cfg: Mapping[str, Any]) -> UserError | None:
    """Returns the sentence for an error of this kind, None for any other. cfg: the resolved config as plain
    values."""
    if not is_out_of_memory(error):
        return None
    first_line = (str(error).strip().splitlines() or [type(error).__name__])[0].strip()
    return UserError(f"Memory ran out ({first_line[:200]}). {advice(cfg)}")


def advice(cfg: Mapping[str, Any]) -> str:
    """Returns the settings that lower memory, with their present values, in the order worth trying."""
    lower = []
    for path in ("train.per_device_batch_size", "train.per_device_eval_batch_size", "data.seq_length"):
        value = _present(cfg, path)
        lower.append(path if value is None else f"{path} (now {value})")
    switch = [
        f"model.gradient_checkpointing=true (now "
        f"{str(_present(cfg, 'model.gradient_checkpointing')).lower()})",
        f"peft=qlora (now {_choice(cfg, 'peft')})",
        f"dist=zero3 (now {_choice(cfg, 'dist')})",
    ]
    already = {
        "model.gradient_checkpointing=true (now true)",
        "peft=qlora (now qlora)",
        "dist=zero3 (now zero3)",
    }
    switch = [text for text in switch if text not in already]
    sentence = f"Lower {', '.join(lower[:-1])} or {lower[-1]}"
    return f"{sentence}; or set {', '.join(switch)}." if switch else f"{sentence}."


def _present(cfg: Mapping[str, Any], path: str) -> Any:
    node: Any = cfg
    for key in path.split("."):
        node = node.get(key) if isinstance(node, Mapping) else None
    return node


def _choice(cfg: Mapping[str, Any], group: str) -> str:
    """The choice of a group as a person types it: mft.model.peft.qlora.QLora -> qlora."""
    return str(_present(cfg, f"{group}._target_")).rpartition(".")[2].lower()
