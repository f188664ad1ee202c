"""What adapters can be: where they sit, how they begin, and what does not go together."""

from __future__ import annotations

import math
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mft.errors import UserError, nearest, shortened
from mft.files.checksums import require_sound

if TYPE_CHECKING:
    from mft.model.peft.modes import Lora
    from mft.model.peft.targets import Site

INITS = ("true", "gaussian", "orthogonal", "pissa", "pissa_niter_16", "olora")
"""How adapters begin, by peft's names: true = B is zero; gaussian: the same with another A; orthogonal: A and B span
spaces that do not meet; pissa: A and B hold the largest singular values of the weight, which lacks them from then on
(pissa_niter_N: found by N iterations, faster); olora: the same with a QR decomposition."""

NEED_DATA = {
    "eva": "activations on data",
    "corda": "activations on data",
    "lora_ga": "gradients on data",
    "loftq": "an unquantised copy of the base",
}

TIED = {"embedding": "the output layer", "head": "the embedding"}


def check(lora: Lora) -> None:
    """Raises UserError for values that no model can take."""
    if lora.rank < 1:
        raise UserError(f"peft.rank={lora.rank} must be at least 1")
    if not 0 < lora.alpha < math.inf:
        raise UserError(f"peft.alpha={lora.alpha} must be above 0 and finite: the update is scaled by alpha / rank")
    if not 0 <= lora.dropout < 1:
        raise UserError(f"peft.dropout={lora.dropout} must be at least 0 and below 1")
    _check_targets(lora.targets)
    _check_init(lora.init, lora.rank)
    asked = "peft.experts=true" if lora.experts else "peft.router=true" if lora.router else ""
    if asked and not lora.path:
        _check_bare(lora, asked)
    if lora.path:
        _check_folder(lora.path, Path(lora.path).expanduser())


def _check_targets(targets: Any) -> None:
    if targets is None:
        return
    if isinstance(targets, str) and targets:
        try:
            re.compile(targets)
        except re.error as error:
            raise UserError(f"peft.targets={targets!r} is not a regular expression: {error}") from error
    elif not isinstance(targets, list) or not targets or not all(isinstance(n, str) and n for n in targets):
        raise UserError(
            f"peft.targets={shortened(targets)} must be a list of module names, one regular expression, all-linear, or "
            "null for the model's own list"
        )


def check_rank(rank: int, width: Any) -> None:
    """Raises UserError for a rank above the width of the model's hidden states, which is a side of every matrix."""
    if isinstance(width, int) and rank > width:
        raise UserError(
            f"peft.rank={rank}: the matrices of this model have no rank above {width}, its hidden size; choose a "
            f"smaller one, e.g. {max(1, min(16, width // 4))}, or peft=full"
        )


def _check_init(init: Any, rank: int) -> None:
    value = str(init).lower()
    if value in NEED_DATA:
        raise UserError(
            f"peft.init={init}: this beginning is computed from {NEED_DATA[value]}, which mft does not do; "
            f"allowed are {', '.join(INITS)}"
        )
    if value not in INITS and not re.fullmatch(r"pissa_niter_\d+", value):
        raise UserError(f"peft.init={init!r} is not one of {', '.join(INITS)}{nearest(value, INITS)}")
    if value == "orthogonal" and rank % 2:
        raise UserError(f"peft.init=orthogonal needs an even rank, not peft.rank={rank}")


def _check_bare(lora: Lora, what: str) -> None:
    """Raises UserError for what peft cannot do to an adapter of a bare weight, which `what` needs."""
    remedies = {
        f"peft.dropout={lora.dropout}": ("peft.dropout=0", lora.dropout > 0),
        "peft.use_dora=true": ("peft.use_dora=false", lora.use_dora),
        f"peft.init={lora.init}": ("peft.init=true", str(lora.init).lower() not in ("true", "gaussian")),
    }
    for given, (remedy, wrong) in remedies.items():
        if wrong:
            raise UserError(
                f"{given} cannot be combined with {what}: the weights of experts and routers are no layers of "
                f"their own, and their adapters are added to the weight itself; choose {remedy}, or leave them out"
            )


def _check_folder(path: str, folder: Path) -> None:
    if not folder.is_dir():
        siblings = [str(p) for p in folder.parent.iterdir()] if folder.parent.is_dir() else []
        raise UserError(f"peft.path={path} does not exist{nearest(folder, siblings)}")
    if not (folder / "adapter_config.json").exists():
        raise UserError(f"peft.path={path} has no adapter_config.json, so it is not an adapter folder")
    require_sound(folder)


def check_places(lora: Lora, places: list[Site], tied: bool) -> None:
    """Raises UserError for places that the other settings do not go with; tied: head and embedding are one weight."""
    for site in places:
        if site.parameter:
            _check_bare(lora, f"an adapter of {site.path}")
        if site.kind == "embedding" and (lora.use_dora or str(lora.init).lower() not in ("true", "gaussian")):
            raise UserError(
                f"peft.targets: an adapter of the embedding {site.path} goes with peft.use_dora=false and "
                "peft.init=true or gaussian only; leave one of them out"
            )
        if site.kind in ("embedding", "head") and tied:
            raise UserError(
                f"peft.targets: {site.path} shares its weight with {TIED[site.kind]}, so an adapter of one would "
                f"change the other when merged; train it whole with peft.modules_to_save=[{site.name}] instead"
            )
