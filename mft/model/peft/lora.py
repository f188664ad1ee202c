"""Low-rank adapters (Hu et al. 2021): their settings, what these rule out, and how peft attaches them."""

from __future__ import annotations

import json
import logging
import re
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, cast

from mft.errors import UserError, check_choice, check_ranges, nearest_sibling, ranged, shortened
from mft.files.checksums import require_sound
from mft.model.peft.full import Full, compute_dtype

if TYPE_CHECKING:
    import torch
    from peft import LoraConfig
    from torch import nn
    from transformers import PreTrainedModel

    from mft.model.causal_lm import CausalLM
    from mft.model.peft.targets import Site

log = logging.getLogger(__name__)

INITS = ("true", "gaussian", "orthogonal", "pissa", "pissa_niter_16", "olora")
"""Initialisations by peft's names: true = B is zero; gaussian: the same with another A; orthogonal: A and B
span orthogonal spaces; pissa: A and B hold the largest singular values of the weight, which lacks them from
then on (pissa_niter_N: found by N iterations, faster); olora: the same with a QR decomposition."""

NEED_DATA = dict.fromkeys(("eva", "corda", "lora_ga"), "a pass over calibration data")
NEED_DATA["loftq"] = "an unquantised copy of the base"
"""Initialisations of peft that are not supported → what they need."""

ZERO_INITS = ("true", "gaussian")
"""Initialisations that leave the model as it was, and need nothing of the weight that they adapt."""


@dataclass
class Lora(Full):
    """Trains low-rank adapters (kept in float32) beside a frozen base."""

    public_name: ClassVar[str] = "lora"
    default_lr: ClassVar[float] = 1e-4
    default_checkpoint_limit: ClassVar[int | None] = None

    rank: int = ranged(16, min=1)
    """Width of the adapters; at most the hidden size of the model."""

    alpha: float = ranged(32.0, above=0)
    """The update is scaled by alpha / rank."""

    dropout: float = ranged(0.0, min=0, below=1)
    """Probability of zeroing an input of the adapters while training."""

    targets: Any = None
    """Modules that get adapters: a list of names, "all-linear", or a regular expression over full module
    paths; None = the family's lora_targets, else all linear layers."""

    experts: bool = False
    """Adapt the routed experts of a mixture of experts, besides `targets`."""

    router: bool = False
    """Adapt the routers of a mixture of experts, besides `targets`."""

    modules_to_save: list[str] = field(default_factory=list)
    """Names of modules that are trained in full and saved with the adapter, e.g. lm_head."""

    use_dora: bool = False
    """Train length and direction of the weights apart (DoRA): often better at small ranks, slower."""

    use_rslora: bool = False
    """Scale the update by alpha / sqrt(rank) instead, which large ranks need."""

    init: Any = True
    """Initialisation of the adapters, one of INITS."""

    fused: bool = True
    """Compute a linear layer and its adapter as one function, where that is the same; false: by peft's own
    path, equal to rounding."""

    path: str | None = None
    """An adapter folder to start from; its own rank, alpha, dropout, targets and so on then hold."""

    @property
    def changes_base(self) -> bool:
        """Whether attaching takes something out of the base's weights, which training then puts back."""
        return self.path is None and self._init.startswith(("pissa", "olora"))

    @property
    def full_weights_reason(self) -> str:
        if self.changes_base:
            return f"peft.init={self.init}"
        return "peft.use_dora=true" if self.use_dora and not self.path else ""

    def files(self) -> list[Path]:
        if not self.path:
            return []
        folder = Path(self.path).expanduser()
        return [folder / "adapter_config.json", *sorted(folder.glob("*.safetensors"))]

    # ── checks, before anything is loaded ──

    def check(self) -> None:
        check_ranges(self, "peft")
        _check_targets(self.targets)
        if self._init in NEED_DATA:
            needed = f"{NEED_DATA[self._init]}, which mft does not support"
            raise UserError(f"peft.init={self.init} needs {needed}; choose one of {', '.join(INITS)}")
        if not re.fullmatch(r"pissa_niter_\d+", self._init):
            check_choice("peft.init", self.init if self.init is None else self._init, INITS)
        if self._init == "orthogonal" and self.rank % 2:
            raise UserError(f"peft.init=orthogonal needs an even rank, not peft.rank={self.rank}")
        if self.path:
            _check_adapter_folder(self.path, Path(self.path).expanduser())
        elif self.experts or self.router:
            self._check_parameter_adapter("peft.experts=true" if self.experts else "peft.router=true")

    def check_against(self, family: CausalLM, precision: str) -> None:
        from mft.model.meta_model import on_meta_device

        super().check_against(family, precision)
        if self.path:  # the settings of that adapter hold
            return
        self._check_rank(family.width())
        by_name = self.targets and self.targets != "all-linear"
        if by_name or self.experts or self.router or self.modules_to_save:  # what not every model can meet
            model = on_meta_device(family, self.quantization(compute_dtype(precision)))
            if model is not None:
                self.config(model, family)

    @property
    def _init(self) -> str:
        """init as yaml writes it: it may be a string, or true."""
        return str(self.init).lower()

    def _check_rank(self, width: int | None) -> None:
        """Raises UserError for a rank above the width of the hidden states, a side of every matrix."""
        if width is not None and self.rank > width:
            raise UserError(
                f"peft.rank={self.rank}: the matrices of this model have no rank above {width}, its hidden "
                f"size; choose a smaller one, e.g. {max(1, min(16, width // 4))}, or peft=full"
            )

    def _check_parameter_adapter(self, reason: str) -> None:
        """Raises UserError for settings that peft cannot apply to an adapter of a bare parameter, which
        `reason` needs: it adds the update to the weight itself, so there is no input to drop and no layer to
        decompose."""
        for name, valid, remedy in (
            ("dropout", self.dropout == 0, "0"),
            ("use_dora", not self.use_dora, "false"),
            ("init", self._init in ZERO_INITS, "true"),
        ):
            shown = str(getattr(self, name)).lower()
            if not valid:
                raise UserError(
                    f"peft.{name}={shown} cannot be combined with {reason}: adapters of experts and routers "
                    f"are added to a bare weight; choose peft.{name}={remedy}, or leave them out"
                )

    def _check_sites(self, sites: list[Site], tied: bool) -> None:
        """Raises UserError for targets that other settings rule out; tied: head and embedding are one
        weight."""
        for site in sites:
            if site.parameter:
                self._check_parameter_adapter(f"an adapter of {site.path}")
            if site.kind == "embedding" and (self.use_dora or self._init not in ZERO_INITS):
                raise UserError(
                    f"peft.targets: an adapter of the embedding {site.path} needs peft.use_dora=false and "
                    "peft.init=true or gaussian"
                )
            if site.kind in ("embedding", "head") and tied:
                raise UserError(
                    f"peft.targets: {site.path} is one weight as embedding and output layer, so its adapter "
                    f"would change both when merged; train it in full with peft.modules_to_save=[{site.name}]"
                )

    # ── attaching ──

    def dtype(self, precision: str) -> torch.dtype:
        # the base is frozen and loses nothing in half precision; the adapters are float32
        return compute_dtype(precision)

    def attach(self, model: nn.Module, family: CausalLM) -> nn.Module:
        """Returns the model wrapped by peft, only its adapters requiring gradients.

        Raises UserError when a target matches no module, with the names there are.
        """
        from peft import PeftModel, get_peft_model

        from mft.model.introspect import base_of
        from mft.model.peft.fused import fuse
        from mft.model.peft.init import in_float32, remember_init
        from mft.model.special_tokens import check_same_tokens

        with warnings.catch_warnings():
            # peft calls what transformers has renamed
            warnings.filterwarnings("ignore", ".*is_gradient_checkpointing", FutureWarning)
            if self.path:
                folder = Path(self.path).expanduser()
                check_same_tokens(base_of(model), folder)
                model = PeftModel.from_pretrained(model, str(folder), is_trainable=True)
                own = cast("LoraConfig", model.peft_config["default"])
                kept = {"rank": own.r, "alpha": own.lora_alpha, "dropout": own.lora_dropout}
                kept |= {"use_dora": own.use_dora, "use_rslora": own.use_rslora}
                if differing := self.differing(kept):
                    log.warning("the adapter at %s keeps its own %s", self.path, differing)
            else:
                model = get_peft_model(model, self.config(base_of(model), family))
        in_float32(model)
        # Saving gives the base back what PiSSA and OLoRA have just taken out of it.
        if self.changes_base:
            remember_init(model)
        if self.fused:
            fuse(model)
        return model

    def computation(self, model: nn.Module) -> str:
        from mft.model.peft.fused import described

        return described(model)

    def config(self, model: PreTrainedModel, family: CausalLM) -> LoraConfig:
        """Returns what peft is to do to a model, also to one without weights.

        Raises UserError for settings that this model cannot meet: a target that matches nothing, with the
        names there are; experts of a dense model.
        """
        from peft import LoraConfig

        from mft.model.introspect import is_tied
        from mft.model.peft.targets import for_peft, full_modules, select
        from mft.model.special_tokens import trained_rows

        targets = self.targets or list(family.lora_targets) or "all-linear"
        self._check_rank(getattr(model.config.get_text_config(), "hidden_size", None))
        # Names are resolved here, not by peft: it takes a name that matches nothing beside one that does, and
        # reaches experts and routers under other keys than linear layers.
        sites = select(model, targets, self.experts, self.router)
        self._check_sites(sites, is_tied(model))
        saved, tied = full_modules(model, self.modules_to_save, sites)
        modules, parameters = for_peft(model, sites)
        return LoraConfig(
            task_type="CAUSAL_LM",
            r=self.rank,
            lora_alpha=self.alpha,  # type: ignore[arg-type]  # a float is fine, and what rsLoRA needs
            lora_dropout=self.dropout,
            target_modules=modules,
            target_parameters=parameters or None,
            modules_to_save=saved or None,
            trainable_token_indices=trained_rows(model, saved),
            ensure_weight_tying=tied,
            use_dora=self.use_dora,
            use_rslora=self.use_rslora,
            init_lora_weights=self._init == "true" or self._init,  # type: ignore[arg-type]  # peft checks it
        )

    def differing(self, kept: Mapping[str, object]) -> str:
        """Returns which settings have no effect beside those that a folder keeps, "" for none."""
        others = {name: value for name, value in kept.items() if getattr(self, name) != value}
        return ", ".join(f"{name}={value} (setting: {getattr(self, name)})" for name, value in others.items())


def _check_targets(targets: object) -> None:
    if isinstance(targets, str) and targets:
        try:
            re.compile(targets)
        except re.error as error:
            raise UserError(f"peft.targets={targets!r} is not a regular expression: {error}") from error
        return
    names = targets if isinstance(targets, list) and targets else [None]
    if targets is not None and not all(isinstance(name, str) and name for name in names):
        raise UserError(
            f"peft.targets={shortened(targets)} must be a list of module names, one regular expression, "
            "all-linear, or null for the model's own list"
        )


def _check_adapter_folder(path: str, folder: Path) -> None:
    if not folder.is_dir():
        raise UserError(f"peft.path={path} does not exist{nearest_sibling(folder)}")
    if not (folder / "adapter_config.json").exists():
        raise UserError(f"peft.path={path} has no adapter_config.json, so it is not an adapter folder.")
    require_sound(folder)
    try:
        values = json.loads((folder / "adapter_config.json").read_text(encoding="utf-8"))
        kind = values.get("peft_type", "LORA")
    except (ValueError, AttributeError) as error:
        raise UserError(
            f"peft.path={path}: its adapter_config.json is not a JSON object: {error}."
        ) from error
    if kind != "LORA":
        raise UserError(
            f"peft.path={path} is an adapter of the kind {shortened(kind)}; mft trains LORA alone."
        )
    if not (folder / "adapter_model.safetensors").exists():
        pickled = (folder / "adapter_model.bin").exists()
        hint = "; its pickled adapter_model.bin is not loaded" if pickled else ""
        raise UserError(f"peft.path={path} has no adapter_model.safetensors{hint}.")
