"""Counts, per kind of module, what of a model is trained and what is frozen."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from mft.model.introspect import weight_count
from mft.model.peft.targets import roles, weights

if TYPE_CHECKING:
    from rich.table import Table
    from torch import nn

GIB = 2**30


@dataclass(frozen=True)
class AuditRow:
    """One kind of module, over all layers."""

    kind: str
    """Its path with layer numbers as *."""

    adapted: int
    """How many of these modules are trained, or have an adapter."""

    total: int
    """How many there are."""

    trainable: int
    """Weights that are trained."""

    parameters: int
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
    kinds = roles({path: shape for path, _, shape in every if shape})
    rows: dict[str, dict[str, Any]] = {}
    for path, parameter, shape in every:
        module = path.removesuffix(".weight").removesuffix(".bias")
        row = rows.setdefault(re.sub(r"(?<=\.)\d+(?=\.)", "*", module), {"modules": {}, "values": [0, 0, 0]})
        row["modules"][module] = row["modules"].get(module, False) or parameter.requires_grad
        count = weight_count(parameter)
        for i, more in enumerate((count * parameter.requires_grad, count, _bytes(parameter))):
            row["values"][i] += more
        row["role"] = row.get("role") or kinds.get(path, "")
        row["packed"] = (
            row.get("packed", False) or hasattr(parameter, "quant_state") or hasattr(parameter, "SCB")
        )
        if kinds.get(path) == "experts" and shape:
            row["experts"] = shape[0]
    return [
        AuditRow(
            kind,
            sum(row["modules"].values()),
            len(row["modules"]),
            trainable=row["values"][0],
            parameters=row["values"][1],
            role=row["role"],
            experts=row.get("experts", 0),
            bytes=row["values"][2],
            packed=row["packed"],
        )
        for kind, row in rows.items()
    ]


def _weights(model: nn.Module) -> Iterator[tuple[str, Any, tuple[int, ...]]]:
    """Yields each weight with the path that it, or what it is an adapter of, has in the plain model, and its
    shape, () for an adapter's."""
    wrapped = {  # adapters of bare weights: one module in another, each of which knows its weight
        name: module.parameter_name
        for name, module in model.named_modules()
        if hasattr(module, "parameter_name")
    }
    for name, parameter, shape in weights(model):
        adapter = re.search(r"\.lora_\w+\b.*", name)
        owner = name[: adapter.start()] if adapter else name
        if adapter and owner in wrapped:
            owner = f"{owner}.{wrapped[owner]}"
        path = owner.removeprefix("base_model.model.")
        path = re.sub(r"\.(base_layer|original_module|token_adapter)(?=\.|$)", "", path)
        path = re.sub(r"\.(modules_to_save|trainable_tokens_delta)\.\w+", "", path)
        yield path, parameter, () if adapter else shape


def _bytes(parameter: Any) -> int:
    """Returns the bytes of a parameter in memory, as if it were not divided over ranks, with the scales of 4
    bits."""
    size = (getattr(parameter, "ds_numel", None) or parameter.numel()) * parameter.element_size()
    state = getattr(parameter, "quant_state", None)
    if state is not None:
        size += sum(
            t.numel() * t.element_size()
            for t in (state.absmax, getattr(state.state2, "absmax", None))
            if t is not None
        )
    return int(size)


def trainable_share(rows: Sequence[AuditRow]) -> float:
    """Returns trainable weights over all weights."""
    return sum(row.trainable for row in rows) / max(sum(row.parameters for row in rows), 1)


def notes(rows: Sequence[AuditRow]) -> list[str]:
    """Returns the sentences about what is easily missed: experts, the router, what quantisation leaves
    out."""
    remarks = []
    word = "trained" if all(row.trainable == row.parameters for row in rows) else "adapted"
    experts = [row for row in rows if row.role == "experts" and row.experts]
    if experts:
        each = max(row.experts for row in experts)
        adapted = max((row.experts * row.adapted // row.total for row in experts), default=0)
        how = "" if adapted else "; peft.experts=true adapts them"
        remarks.append(
            f"experts: {adapted} of {each} {word} (in each of {max(r.total for r in experts)} layers){how}"
        )
    routers = [row for row in rows if row.role == "router"]
    if routers:
        adapted, total = sum(row.adapted for row in routers), sum(row.total for row in routers)
        remarks.append(f"router: {adapted} of {total} {word}")
    if experts and any(row.packed for row in rows):
        size, total = sum(row.bytes for row in experts), sum(row.bytes for row in rows)
        remarks.append(
            f"experts are not quantised (bitsandbytes quantises linear layers only): they take "
            f"{size / GIB:.3g} of {total / GIB:.3g} GiB"
        )
    return remarks


def table(rows: Sequence[AuditRow]) -> Table:
    """Returns the audit as a rich table that shows every name in 80 columns; 0 of 48 x 128: of 48 layers of
    128 experts."""
    from rich.table import Table

    trainable, parameters = sum(row.trainable for row in rows), sum(row.parameters for row in rows)
    table = Table(
        title=f"trained: {trainable:,} of {parameters:,} weights ({trainable_share(rows):.2%})",
        caption="\n".join(notes(rows)) or None,
        caption_justify="left",
        box=None,
        padding=(0, 1, 0, 0),
    )
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
            return f"{count / size:.3g}{unit}" if count < 999.5 * size else f"{count / size:.0f}{unit}"
    return str(count)


def as_json(rows: Sequence[AuditRow]) -> dict[str, Any]:
    """Returns the audit as plain values, for a file."""
    return {
        "trainable_share": trainable_share(rows),
        "notes": notes(rows),
        "modules": {row.kind: {k: v for k, v in vars(row).items() if k != "kind"} for row in rows},
    }
