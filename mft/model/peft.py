"""What of a model is trained: everything, or low-rank adapters on a full or a 4-bit base."""

from __future__ import annotations

import logging
import re
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mft.errors import UserError, nearest
from mft.model.parts import weight_count

if TYPE_CHECKING:
    import torch
    from rich.table import Table
    from torch import nn
    from transformers import BitsAndBytesConfig

    from mft.model.family import CausalLM

log = logging.getLogger(__name__)

PRECISIONS = {"bf16": "bfloat16", "fp16": "float16", "fp32": "float32"}


def compute_dtype(precision: str) -> torch.dtype:
    """Returns the torch dtype that a run of precision bf16, fp16 or fp32 computes in."""
    import torch

    return getattr(torch, PRECISIONS[precision])


@dataclass
class Full:
    """Trains every parameter. The weights are float32 whatever the precision: bf16 cannot hold an update of 1e-5 of its
    value."""

    @property
    def default_lr(self) -> float:
        return 1e-5

    @property
    def keep_default(self) -> int | None:
        """Checkpoints kept beside the best one (None = all). A full checkpoint holds 12 bytes a parameter."""
        return 3

    def check(self) -> None:
        """Nothing can be wrong."""

    def dtype(self, precision: str) -> torch.dtype:
        """Returns the dtype of the base weights; precision: bf16, fp16 or fp32."""
        return compute_dtype("fp32")

    def quantization(self, compute_dtype: torch.dtype) -> BitsAndBytesConfig | None:
        """Returns how the base is quantised on loading, or None."""
        return None

    def attach(self, model: nn.Module, family: CausalLM) -> nn.Module:
        """Returns the model with what is to be trained requiring gradients."""
        return model.requires_grad_(True)

    def audit(self, model: nn.Module) -> list[AuditRow]:
        """Returns what is trained, a row per kind of module."""
        return audit(model)


@dataclass
class Lora(Full):
    """Trains low-rank adapters (kept in float32) beside a frozen base.

    rank; alpha: the update is scaled by alpha / rank; dropout: of the adapter's input; targets: None = the family's
    list or else all linear layers, a list of module names, "all-linear", or a regular expression over whole module
    paths; path: an adapter folder to start from, whose rank, alpha and targets then hold.
    """

    rank: int = 16
    alpha: float = 32.0
    dropout: float = 0.0
    targets: Any = None
    path: str | None = None

    @property
    def default_lr(self) -> float:
        return 1e-4

    @property
    def keep_default(self) -> int | None:
        return None

    def check(self) -> None:
        """Raises UserError for values that no model can take."""
        if self.rank < 1:
            raise UserError(f"peft.rank={self.rank} must be at least 1")
        if not 0 <= self.dropout < 1:
            raise UserError(f"peft.dropout={self.dropout} must be at least 0 and below 1")
        if self.targets is not None and not isinstance(self.targets, str):
            if not self.targets or not all(isinstance(name, str) for name in self.targets):
                raise UserError(
                    f"peft.targets={self.targets!r} must be a list of module names, or one regular expression"
                )
        elif self.targets:
            try:
                re.compile(self.targets)
            except re.error as error:
                raise UserError(f"peft.targets={self.targets!r} is not a regular expression: {error}") from error
        if self.path:
            self._check_adapter(Path(self.path).expanduser())

    def _check_adapter(self, folder: Path) -> None:
        if not folder.is_dir():
            siblings = [str(p) for p in folder.parent.iterdir()] if folder.parent.is_dir() else []
            raise UserError(f"peft.path={self.path} does not exist{nearest(folder, siblings)}")
        if not (folder / "adapter_config.json").exists():
            raise UserError(f"peft.path={self.path} has no adapter_config.json, so it is not an adapter folder")

    def dtype(self, precision: str) -> torch.dtype:
        return compute_dtype(
            precision
        )  # the base is frozen and loses nothing in half precision; the adapters are float32

    def attach(self, model: nn.Module, family: CausalLM) -> nn.Module:
        """Returns the model wrapped by peft, only its adapters requiring gradients.

        Raises UserError when a target matches no module, with the names there are.
        """
        from peft import LoraConfig, PeftModel, get_peft_model

        if self.path:
            with without_renaming_notice():
                model = PeftModel.from_pretrained(model, str(Path(self.path).expanduser()), is_trainable=True)
            self._tell_ignored(model.peft_config["default"])
            return model
        targets = self.targets or list(family.lora_targets) or "all-linear"
        if targets != "all-linear":
            check_targets(model, targets)
        config = LoraConfig(
            task_type="CAUSAL_LM",
            r=self.rank,
            lora_alpha=self.alpha,  # type: ignore[arg-type]  # a float is fine, and what rsLoRA needs
            lora_dropout=self.dropout,
            target_modules=targets if isinstance(targets, str) else list(targets),
        )
        with without_renaming_notice():
            return get_peft_model(model, config)

    def _tell_ignored(self, config: Any) -> None:
        own = {"rank": config.r, "alpha": config.lora_alpha, "dropout": config.lora_dropout}
        differing = [f"{name}={value} (asked: {getattr(self, name)})" for name, value in own.items()]
        if any(getattr(self, name) != value for name, value in own.items()):
            log.warning("the adapter at %s keeps its own %s", self.path, ", ".join(differing))


@dataclass
class QLora(Lora):
    """Trains adapters beside a base held in 4 bits by bitsandbytes, which computes in the precision of the run.

    quant_type: nf4 | fp4; double_quant: quantise the scales too (0.4 bits a weight less).
    """

    quant_type: str = "nf4"
    double_quant: bool = True

    def check(self) -> None:
        super().check()
        if self.quant_type not in ("nf4", "fp4"):
            raise UserError(f"peft.quant_type={self.quant_type!r} is not one of nf4, fp4")

    def quantization(self, compute_dtype: torch.dtype) -> BitsAndBytesConfig | None:
        from transformers import BitsAndBytesConfig

        return BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type=self.quant_type,
            bnb_4bit_use_double_quant=self.double_quant,
            bnb_4bit_compute_dtype=compute_dtype,
        )


@contextmanager
def without_renaming_notice() -> Iterator[None]:
    """Keeps transformers from telling our users that peft asks for an attribute by its old name."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".*is_gradient_checkpointing", FutureWarning)
        yield


# ── targets ──


def linear_names(model: nn.Module) -> list[str]:
    """Returns the paths of the modules an adapter can sit on: linear layers of any kind, and embeddings."""
    from torch import nn
    from transformers.pytorch_utils import Conv1D

    return [name for name, module in model.named_modules() if isinstance(module, nn.Linear | nn.Embedding | Conv1D)]


def check_targets(model: nn.Module, targets: str | list[str]) -> None:
    """Raises UserError when a name of the list, or the regular expression, matches no module of the model."""
    paths = linear_names(model)
    if isinstance(targets, str):
        missing = [] if any(re.fullmatch(targets, path) for path in paths) else [targets]
    else:
        missing = [name for name in targets if not any(path == name or path.endswith(f".{name}") for path in paths)]
    if not missing:
        return
    names = list(dict.fromkeys(path.rpartition(".")[2] for path in paths))
    what = "the regular expression" if isinstance(targets, str) else "the name"
    note = ' (a single name needs brackets: peft.targets="[q_proj]")' if targets in names else ""
    raise UserError(
        f"peft.targets: {what} {missing[0]!r} matches no module; this model has {', '.join(names)}"
        f"{nearest(missing[0], names)}{note}"
    )


# ── audit ──


@dataclass(frozen=True)
class AuditRow:
    """One kind of module, its path with layer numbers as *. adapted, total: modules; trainable, parameters: weights."""

    kind: str
    adapted: int
    total: int
    trainable: int
    parameters: int


def audit(model: nn.Module) -> list[AuditRow]:
    """Returns, per kind of module and in the model's order, how many are trained or adapted and with how many
    weights."""
    modules: dict[str, dict[str, bool]] = {}
    weights: dict[str, list[int]] = {}
    for path, parameter in _weights(model):
        kind = re.sub(r"(?<=\.)\d+(?=\.)", "*", path)
        seen = modules.setdefault(kind, {})
        seen[path] = seen.get(path, False) or parameter.requires_grad
        count = weight_count(parameter)
        trainable, total = weights.setdefault(kind, [0, 0])
        weights[kind] = [trainable + count * parameter.requires_grad, total + count]
    return [AuditRow(kind, sum(seen.values()), len(seen), *weights[kind]) for kind, seen in modules.items()]


def _weights(model: nn.Module) -> Iterator[tuple[str, Any]]:
    """Yields each parameter with the path of the module of the plain model that it belongs to."""
    for name, parameter in model.named_parameters():
        path = name.removeprefix("base_model.model.")
        path = re.sub(r"\.(lora_\w+|base_layer|modules_to_save|original_module)\b.*", "", path)
        yield (path.removesuffix(".weight").removesuffix(".bias"), parameter)


def trainable_share(rows: list[AuditRow]) -> float:
    """Returns trainable weights over all weights."""
    return sum(row.trainable for row in rows) / max(sum(row.parameters for row in rows), 1)


def audit_table(rows: list[AuditRow]) -> Table:
    """Returns the audit as a rich table."""
    from rich.table import Table

    trainable, parameters = sum(row.trainable for row in rows), sum(row.parameters for row in rows)
    table = Table(title=f"trained: {trainable:,} of {parameters:,} weights ({trainable_share(rows):.2%})")
    table.add_column("module")
    for title in ("adapted", "of", "trainable", "weights", "share"):
        table.add_column(title, justify="right")
    for row in rows:
        share = f"{row.trainable / row.parameters:.2%}" if row.parameters else ""
        cells = (row.kind, row.adapted, row.total, f"{row.trainable:,}", f"{row.parameters:,}", share)
        table.add_row(*(str(cell) for cell in cells), style=None if row.adapted else "dim")
    return table
