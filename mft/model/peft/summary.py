"""Counts, per kind of module, what of a model is trained and what is frozen."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from mft.model.introspect import full_shape
from mft.model.peft.targets import roles, weights

if TYPE_CHECKING:
    from rich.table import Table
    from torch import nn

GIB = 2**30


@dataclass
class AuditRow:
    """One kind of module, over all layers."""

    kind: str
    """Its path with layer numbers as *."""

    adapted: int = 0
    """How many of these modules are trained, or have an adapter."""

    total: int = 0
    """How many there are."""

    trainable: int = 0
    """Weights that are trained."""

    parameters: int = 0
    """All weights."""

    role: str = ""
    """experts | router | "" """

    experts: int = 0
    """Routed experts in one such module, 0 elsewhere."""

    bytes: int = 0
    """What it takes in memory as loaded."""

    packed: bool = False
    """Whether it is quantised."""


def audit(model: nn.Module) -> list[AuditRow]:
    """Returns, per kind of module and in the model's order, how many are trained or adapted and with how many
    weights."""
    every = list(_weights(model))
    # Without adapters, whose shapes say nothing of what they adapt.
    kinds = roles({path: shape for path, _, shape in every if shape})
    rows: dict[str, AuditRow] = {}
    trained: dict[str, dict[str, bool]] = {}  # kind → path of each of its modules → whether it is trained
    for path, parameter, shape in every:
        module = path.removesuffix(".weight").removesuffix(".bias")
        kind = re.sub(r"(?<=\.)\d+(?=\.)", "*", module)
        row, modules = rows.setdefault(kind, AuditRow(kind)), trained.setdefault(kind, {})
        modules[module] = modules.get(module, False) or parameter.requires_grad
        row.adapted, row.total = sum(modules.values()), len(modules)
        count = math.prod(full_shape(parameter))
        row.trainable += count * parameter.requires_grad
        row.parameters += count
        row.bytes += bytes_of(parameter)
        row.role = row.role or kinds.get(path, "")
        row.packed |= hasattr(parameter, "quant_state") or hasattr(parameter, "SCB")
        if kinds.get(path) == "experts" and shape:
            row.experts = shape[0]
    return list(rows.values())


def _weights(model: nn.Module) -> Iterator[tuple[str, nn.Parameter, tuple[int, ...]]]:
    """Yields each weight with the path that it, or what it is an adapter of, has in the plain model, and its
    shape, () for an adapter's."""
    # Adapters of bare weights lie in a module around the owner, which knows the name of its weight.
    wrapped = {n: m.parameter_name for n, m in model.named_modules() if hasattr(m, "parameter_name")}
    for name, parameter, shape in weights(model):
        adapter = re.search(r"\.lora_\w+\b.*", name)
        owner = name[: adapter.start()] if adapter else name
        if adapter and owner in wrapped:
            owner = f"{owner}.{wrapped[owner]}"
        path = owner.removeprefix("base_model.model.")
        path = re.sub(r"\.(base_layer|original_module|token_adapter)(?=\.|$)", "", path)
        path = re.sub(r"\.(modules_to_save|trainable_tokens_delta)\.\w+", "", path)
        yield path, parameter, () if adapter else shape


def bytes_of(parameter: Any) -> int:
    """Returns the bytes of a parameter in memory, as if it were not divided over ranks, with the scales of 4
    bits; of a model on the meta device what it will take once it is loaded."""
    if parameter.is_meta and getattr(parameter, "bnb_quantized", None) is False:
        scale = 1 + 4 / 256 if parameter.compress_statistics else 4  # bytes for a block of values
        return int(parameter.numel() * (0.5 + scale / parameter.blocksize))
    if parameter.is_meta and hasattr(parameter, "SCB"):
        return int(parameter.numel())
    size = (getattr(parameter, "ds_numel", None) or parameter.numel()) * parameter.element_size()
    state = getattr(parameter, "quant_state", None)
    while state is not None:  # with double quantisation the scales have their own state
        size += state.absmax.nbytes
        state = state.state2
    return int(size)


def total_of(rows: Sequence[AuditRow], field: str) -> int:
    return sum(getattr(row, field) for row in rows)


def trainable_share(rows: Sequence[AuditRow]) -> float:
    """Returns trainable weights over all weights."""
    return total_of(rows, "trainable") / max(total_of(rows, "parameters"), 1)


def notes(rows: Sequence[AuditRow]) -> list[str]:
    """Returns the sentences about what is easily missed: experts, the router, what quantisation leaves
    out."""
    remarks = []
    verb = "trained" if total_of(rows, "trainable") == total_of(rows, "parameters") else "adapted"
    experts = [row for row in rows if row.role == "experts" and row.experts]
    routers = [row for row in rows if row.role == "router"]
    if experts:
        each, layers = max(row.experts for row in experts), max(row.total for row in experts)
        # The experts of a layer are one weight: an adapter of it adapts all of them.
        adapted = max(row.experts * row.adapted // row.total for row in experts)
        how = "" if adapted else "; peft.experts=true adapts them"
        remarks.append(f"experts: {adapted} of {each} {verb} (in each of {layers} layers){how}")
    if routers:
        remarks.append(f"router: {total_of(routers, 'adapted')} of {total_of(routers, 'total')} {verb}")
    if experts and any(row.packed for row in rows):
        size, every = total_of(experts, "bytes") / GIB, total_of(rows, "bytes") / GIB
        reason = "bitsandbytes quantises linear layers only"
        remarks.append(f"experts are not quantised ({reason}): they take {size:.4g} of {every:.4g} GiB")
    return remarks


def table(rows: Sequence[AuditRow]) -> Table:
    """Returns the audit as a rich table that shows every name in 80 columns; 0 of 48 x 128: of 48 layers of
    128 experts."""
    from rich.table import Table

    trainable, parameters = total_of(rows, "trainable"), total_of(rows, "parameters")
    title = f"trained: {trainable:,} of {parameters:,} weights ({trainable_share(rows):.2%})"
    caption = "\n".join(notes(rows)) or None
    table = Table(title=title, caption=caption, caption_justify="left", box=None, padding=(0, 1, 0, 0))
    table.add_column("module", overflow="fold")
    for title in ("adapted", "trained", "weights", "share", "GiB"):
        table.add_column(title, justify="right", no_wrap=True)
    for row in rows:
        share = f"{row.trainable / row.parameters:.2%}" if row.trainable else "0%"
        adapted = f"{row.adapted} of {row.total}" + (f" x {row.experts}" if row.experts else "")
        counts = (_short(row.trainable), _short(row.parameters), share, f"{row.bytes / GIB:.2f}")
        table.add_row(row.kind.removeprefix("model."), adapted, *counts, style=None if row.adapted else "dim")
    return table


def _short(count: int) -> str:
    """Returns a count in three digits: 17.9K, 1.05M, 30.5B."""
    for unit, size in (("B", 10**9), ("M", 10**6), ("K", 10**3)):
        if count >= size:
            # from 999.5 on three digits would be written as 1e+03
            return f"{count / size:{'.3g' if count < 999.5 * size else '.0f'}}{unit}"
    return str(count)


def as_json(rows: Sequence[AuditRow]) -> dict[str, Any]:
    """Returns the audit as plain values, for a file."""
    return {
        "trainable_share": trainable_share(rows),
        "notes": notes(rows),
        "modules": {row.kind: {k: v for k, v in vars(row).items() if k != "kind"} for row in rows},
    }
