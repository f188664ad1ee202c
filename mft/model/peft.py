"""What of a model is trained: everything, or low-rank adapters on a full or a quantised base."""

from __future__ import annotations

import logging
import re
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mft.errors import UserError, nearest

if TYPE_CHECKING:
    import torch
    from torch import nn
    from transformers import BitsAndBytesConfig

    from mft.model.audit import AuditRow
    from mft.model.family import CausalLM
    from mft.model.targets import Site

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

    @property
    def reads_base(self) -> str:
        """The setting for which `attach` has to read the base's weights, "" for none."""
        return ""

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
        from mft.model.audit import audit

        return audit(model)


@dataclass
class Lora(Full):
    """Trains low-rank adapters (kept in float32) beside a frozen base.

    rank; alpha: the update is scaled by alpha / rank; dropout: of the adapter's input; targets: None = the family's
    list or else all linear layers, a list of module names, "all-linear", or a regular expression over whole module
    paths; experts, router: adapt those of a mixture of experts besides; modules_to_save: names of modules trained whole
    and saved with the adapter; use_dora: train length and direction of the weights apart; use_rslora: scale by
    alpha / sqrt(rank); init: how adapters begin, see INITS; path: an adapter folder to start from, whose own settings
    then hold.
    """

    rank: int = 16
    alpha: float = 32.0
    dropout: float = 0.0
    targets: Any = None
    experts: bool = False
    router: bool = False
    modules_to_save: list[str] = field(default_factory=list)
    use_dora: bool = False
    use_rslora: bool = False
    init: Any = True
    path: str | None = None

    @property
    def default_lr(self) -> float:
        return 1e-4

    @property
    def keep_default(self) -> int | None:
        return None

    @property
    def changes_base(self) -> bool:
        """Whether attaching takes something out of the base's weights, which training then puts back."""
        return self.path is None and str(self.init).startswith(("pissa", "olora"))

    @property
    def reads_base(self) -> str:
        if self.path:
            return ""
        return f"peft.init={self.init}" if self.changes_base else "peft.use_dora=true" if self.use_dora else ""

    def check(self) -> None:
        """Raises UserError for values that no model can take."""
        if self.rank < 1:
            raise UserError(f"peft.rank={self.rank} must be at least 1")
        if not 0 <= self.dropout < 1:
            raise UserError(f"peft.dropout={self.dropout} must be at least 0 and below 1")
        self._check_targets()
        self._check_init()
        asked = "peft.experts=true" if self.experts else "peft.router=true" if self.router else ""
        if asked and not self.path:
            self._check_bare(asked)
        if self.path:
            self._check_adapter(Path(self.path).expanduser())

    def _check_targets(self) -> None:
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

    def _check_init(self) -> None:
        value = str(self.init).lower()
        if value in NEED_DATA:
            raise UserError(
                f"peft.init={self.init}: this beginning is computed from {NEED_DATA[value]}, which mft does not do; "
                f"allowed are {', '.join(INITS)}"
            )
        if value not in INITS and not re.fullmatch(r"pissa_niter_\d+", value):
            raise UserError(f"peft.init={self.init!r} is not one of {', '.join(INITS)}{nearest(value, INITS)}")
        if value == "orthogonal" and self.rank % 2:
            raise UserError(f"peft.init=orthogonal needs an even rank, not peft.rank={self.rank}")

    def _check_bare(self, what: str) -> None:
        """Raises UserError for what peft cannot do to an adapter of a bare weight, which `what` needs."""
        remedies = {
            f"peft.dropout={self.dropout}": ("peft.dropout=0", self.dropout > 0),
            "peft.use_dora=true": ("peft.use_dora=false", self.use_dora),
            f"peft.init={self.init}": ("peft.init=true", str(self.init).lower() not in ("true", "gaussian")),
        }
        for given, (remedy, wrong) in remedies.items():
            if wrong:
                raise UserError(
                    f"{given} cannot be combined with {what}: the weights of experts and routers are no layers of "
                    f"their own, and their adapters are added to the weight itself; choose {remedy}, or leave them out"
                )

    def _check_adapter(self, folder: Path) -> None:
        if not folder.is_dir():
            siblings = [str(p) for p in folder.parent.iterdir()] if folder.parent.is_dir() else []
            raise UserError(f"peft.path={self.path} does not exist{nearest(folder, siblings)}")
        if not (folder / "adapter_config.json").exists():
            raise UserError(f"peft.path={self.path} has no adapter_config.json, so it is not an adapter folder")

    def dtype(self, precision: str) -> torch.dtype:
        # the base is frozen and loses nothing in half precision; the adapters are float32
        return compute_dtype(precision)

    def attach(self, model: nn.Module, family: CausalLM) -> nn.Module:
        """Returns the model wrapped by peft, only its adapters requiring gradients.

        Raises UserError when a target matches no module, with the names there are.
        """
        from peft import LoraConfig, PeftModel, get_peft_model

        from mft.model.parts import base_of
        from mft.model.start import in_float32, remember
        from mft.model.targets import chosen, for_peft, whole_modules
        from mft.model.tokens import check_same, trained_rows

        if self.path:
            check_same(base_of(model), Path(self.path).expanduser())
            with without_notices():
                model = PeftModel.from_pretrained(model, str(Path(self.path).expanduser()), is_trainable=True)
            self._tell_ignored(model.peft_config["default"])
            return in_float32(model)
        targets = self.targets or list(family.lora_targets) or "all-linear"
        places = chosen(model, targets, self.experts, self.router)
        self._check_places(model, places)
        saved, tied = whole_modules(model, self.modules_to_save, places)
        modules, parameters = for_peft(model, places)
        rows = trained_rows(base_of(model), saved)
        config = LoraConfig(
            task_type="CAUSAL_LM",
            r=self.rank,
            lora_alpha=self.alpha,  # type: ignore[arg-type]  # a float is fine, and what rsLoRA needs
            lora_dropout=self.dropout,
            target_modules=modules,
            target_parameters=parameters or None,
            modules_to_save=saved or None,
            trainable_token_indices=rows,
            ensure_weight_tying=tied,
            use_dora=self.use_dora,
            use_rslora=self.use_rslora,
            init_lora_weights=self._init(),
        )
        with without_notices():
            model = in_float32(get_peft_model(model, config))
        if self.changes_base:
            remember(model)
        return model

    def _init(self) -> Any:
        return True if str(self.init).lower() == "true" else str(self.init).lower()

    def _check_places(self, model: nn.Module, places: list[Site]) -> None:
        """Raises UserError for places that the other settings do not go with."""
        from mft.model.parts import base_of, is_tied

        for site in places:
            if site.parameter:
                self._check_bare(f"an adapter of {site.path}")
            if site.kind == "embedding" and (self.use_dora or self._init() not in (True, "gaussian")):
                raise UserError(
                    f"peft.targets: an adapter of the embedding {site.path} goes with peft.use_dora=false and "
                    "peft.init=true or gaussian only; leave one of them out"
                )
            if site.kind in ("embedding", "head") and is_tied(base_of(model)):
                raise UserError(
                    f"peft.targets: {site.path} shares its weight with {TIED[site.kind]}, so an adapter of one would "
                    f"change the other when merged; train it whole with peft.modules_to_save=[{site.name}] instead"
                )

    def _tell_ignored(self, config: Any) -> None:
        own = {"rank": config.r, "alpha": config.lora_alpha, "dropout": config.lora_dropout}
        own |= {"use_dora": config.use_dora, "use_rslora": config.use_rslora}
        differing = [f"{n}={v} (asked: {getattr(self, n)})" for n, v in own.items() if getattr(self, n) != v]
        if differing:
            log.warning("the adapter at %s keeps its own %s", self.path, ", ".join(differing))


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


@dataclass
class QLora(Lora):
    """Trains adapters beside a base quantised by bitsandbytes.

    bits: 4 | 8; quant_type: nf4 | fp4; double_quant: quantise the scales too (0.4 bits a weight less); compute_dtype:
    bf16 | fp16 | fp32, None = the run's precision; storage_dtype: uint8 | bf16 | fp16 | fp32, of the packed weights;
    skip_modules: names that stay unquantised besides the head. The last four but skip_modules are for 4 bits.
    """

    bits: int = 4
    quant_type: str = "nf4"
    double_quant: bool = True
    compute_dtype: str | None = None
    storage_dtype: str = "uint8"
    skip_modules: list[str] = field(default_factory=list)

    def check(self) -> None:
        super().check()
        allowed = {
            "bits": (4, 8),
            "quant_type": ("nf4", "fp4"),
            "compute_dtype": (None, *PRECISIONS),
            "storage_dtype": ("uint8", *PRECISIONS),
        }
        for name, values in allowed.items():
            value = getattr(self, name)
            if value not in values:
                listed = ", ".join("null" if v is None else str(v) for v in values)
                raise UserError(f"peft.{name}={value!r} is not one of {listed}{nearest(str(value), map(str, values))}")
        if self.bits == 8 and self.use_dora:
            raise UserError(
                "peft.use_dora=true needs the weights while it is attached, which 8-bit layers do not give back before "
                "they have computed; choose peft.bits=4 or peft.use_dora=false"
            )
        if self.changes_base:
            raise UserError(
                f"peft.init={self.init} takes the largest part out of the base's weights, which quantised weights "
                "cannot hold; choose peft.init=true, or peft=lora"
            )

    def quantization(self, compute_dtype: torch.dtype) -> BitsAndBytesConfig | None:
        import torch
        from transformers import BitsAndBytesConfig

        # given patterns replace transformers' own list, which is the head, and are matched from the start of a path
        skip = [rf"(?:.*\.)?{re.escape(n)}" for n in (*self.skip_modules, *HEADS)] if self.skip_modules else None
        if self.bits == 8:
            return BitsAndBytesConfig(load_in_8bit=True, llm_int8_skip_modules=skip)
        storage = PRECISIONS.get(self.storage_dtype, self.storage_dtype)
        return BitsAndBytesConfig(
            load_in_4bit=True,
            llm_int8_skip_modules=skip,
            bnb_4bit_quant_type=self.quant_type,
            bnb_4bit_use_double_quant=self.double_quant,
            bnb_4bit_compute_dtype=getattr(torch, PRECISIONS[self.compute_dtype])
            if self.compute_dtype
            else compute_dtype,
            bnb_4bit_quant_storage=getattr(torch, storage),
        )

    def attach(self, model: nn.Module, family: CausalLM) -> nn.Module:
        from mft.model.targets import sites

        places = sites(model)
        for name in self.skip_modules:
            if not any(f".{name}." in f".{site.path}." for site in places):
                names = list(dict.fromkeys(site.name for site in places))
                raise UserError(
                    f"peft.skip_modules: {name!r} matches no module; this model has {', '.join(names)}"
                    f"{nearest(name, names)}"
                )
        return super().attach(model, family)


HEADS = ("lm_head", "embed_out", "output_layer")
"""Names of output layers in transformers."""


@contextmanager
def without_notices() -> Iterator[None]:
    """Keeps from our users what peft and transformers say about each other."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".*is_gradient_checkpointing", FutureWarning)
        yield
