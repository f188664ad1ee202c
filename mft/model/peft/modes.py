"""What of a model is trained: everything, or low-rank adapters on a full or a quantised base."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from mft.model.peft import adapters, quantisation
from mft.model.peft.quantisation import compute_dtype
from mft.model.stored import refuse_quantised

if TYPE_CHECKING:
    import torch
    from peft import LoraConfig
    from torch import nn
    from transformers import BitsAndBytesConfig

    from mft.model.causal_lm import CausalLM
    from mft.model.peft.summary import AuditRow
    from mft.model.stored import Stored

log = logging.getLogger(__name__)


@dataclass
class Full:
    """Trains every parameter. The weights are float32 whatever the precision: bf16 cannot hold an update of 1e-5 of its
    value."""

    public_name: ClassVar[str] = "full"

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

    def files(self) -> list[Path]:
        """Returns the files that are read beside the base model."""
        return []

    def check(self) -> None:
        """Raises UserError for values that no model can take."""

    def check_with(self, family: CausalLM, precision: str) -> None:
        """Raises UserError for settings that the model cannot meet, as far as its config.json tells; loads no
        weights. precision: bf16, fp16 or fp32."""
        if family.router_coef:
            from mft.model.meta_model import skeleton

            if (model := skeleton(family)) is not None:
                family.router_weight(model)
        if family.path and Path(family.path).expanduser().is_dir():  # a hub name is judged when it is loaded
            self._check_stored(family.path, family.stored())

    def _check_stored(self, path: str, held: Stored) -> None:
        refuse_quantised(path, held, 0)

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
        from mft.model.peft.summary import audit

        return audit(model)


@dataclass
class Lora(Full):
    """Trains low-rank adapters (kept in float32) beside a frozen base.

    rank; alpha: the update is scaled by alpha / rank; dropout: of the adapter's input; targets: None = the family's
    list or else all linear layers, a list of module names, "all-linear", or a regular expression over whole module
    paths; experts, router: adapt those of a mixture of experts besides; modules_to_save: names of modules trained whole
    and saved with the adapter; use_dora: train length and direction of the weights apart; use_rslora: scale by
    alpha / sqrt(rank); init: how adapters begin, see adapters.INITS; path: an adapter folder to start from, whose own
    settings then hold.
    """

    public_name: ClassVar[str] = "lora"

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

    def files(self) -> list[Path]:
        if not self.path:
            return []
        folder = Path(self.path).expanduser()
        return [folder / "adapter_config.json", *sorted(folder.glob("*.safetensors"))]

    def check(self) -> None:
        adapters.check(self)

    def check_with(self, family: CausalLM, precision: str) -> None:
        from mft.model.meta_model import skeleton

        super().check_with(family, precision)
        if not self.path:
            adapters.check_rank(self.rank, family.width())
        if self._asks_of_the_model and not self.path:
            model = skeleton(family, self.quantization(compute_dtype(precision)))
            if model is not None:
                self.config(model, family)

    @property
    def _asks_of_the_model(self) -> bool:
        """Whether there are settings that one model can meet and another cannot."""
        placed = self.targets and self.targets != "all-linear"
        return bool(placed or self.experts or self.router or self.modules_to_save)

    def dtype(self, precision: str) -> torch.dtype:
        # the base is frozen and loses nothing in half precision; the adapters are float32
        return compute_dtype(precision)

    def attach(self, model: nn.Module, family: CausalLM) -> nn.Module:
        """Returns the model wrapped by peft, only its adapters requiring gradients.

        Raises UserError when a target matches no module, with the names there are.
        """
        from peft import PeftModel, get_peft_model

        from mft.model.introspect import base_of
        from mft.model.peft.init import in_float32, remember
        from mft.model.tokens import check_same

        if self.path:
            check_same(base_of(model), Path(self.path).expanduser())
            with without_notices():
                model = PeftModel.from_pretrained(model, str(Path(self.path).expanduser()), is_trainable=True)
            self._tell_ignored(model.peft_config["default"])
            return in_float32(model)
        with without_notices():
            model = in_float32(get_peft_model(model, self.config(base_of(model), family)))
        if self.changes_base:
            remember(model)
        return model

    def config(self, model: Any, family: CausalLM) -> LoraConfig:
        """Returns what peft is to do to a model, also to one without weights.

        Raises UserError for settings that this model cannot meet: a target that matches nothing, with the names there
        are; experts of a dense model.
        """
        from peft import LoraConfig

        from mft.model.introspect import is_tied
        from mft.model.peft.targets import chosen, for_peft, whole_modules
        from mft.model.tokens import trained_rows

        targets, init = self.targets or list(family.lora_targets) or "all-linear", str(self.init).lower()
        adapters.check_rank(self.rank, getattr(model.config.get_text_config(), "hidden_size", None))
        places = chosen(model, targets, self.experts, self.router)
        adapters.check_places(self, places, is_tied(model))
        saved, tied = whole_modules(model, self.modules_to_save, places)
        modules, parameters = for_peft(model, places)
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
            init_lora_weights=True if init == "true" else init,  # type: ignore[arg-type]  # peft checks it
        )

    def _tell_ignored(self, config: Any) -> None:
        own = {"rank": config.r, "alpha": config.lora_alpha, "dropout": config.lora_dropout}
        own |= {"use_dora": config.use_dora, "use_rslora": config.use_rslora}
        differing = [f"{n}={v} (asked: {getattr(self, n)})" for n, v in own.items() if getattr(self, n) != v]
        if differing:
            log.warning("the adapter at %s keeps its own %s", self.path, ", ".join(differing))


@dataclass
class QLora(Lora):
    """Trains adapters beside a base quantised by bitsandbytes.

    bits: 4 | 8; quant_type: nf4 | fp4; double_quant: quantise the scales too (0.4 bits a weight less); compute_dtype:
    bf16 | fp16 | fp32, None = the run's precision; storage_dtype: uint8 | bf16 | fp16 | fp32, of the packed weights;
    skip_modules: names that stay unquantised besides the head. The last four but skip_modules are for 4 bits.
    """

    public_name: ClassVar[str] = "qlora"

    bits: int = 4
    quant_type: str = "nf4"
    double_quant: bool = True
    compute_dtype: str | None = None
    storage_dtype: str = "uint8"
    skip_modules: list[str] = field(default_factory=list)

    def check(self) -> None:
        super().check()
        quantisation.check(self)

    def check_with(self, family: CausalLM, precision: str) -> None:
        from mft.model.meta_model import has_experts, skeleton

        super().check_with(family, precision)
        if (self.skip_modules or has_experts(family)) and (model := skeleton(family)) is not None:
            quantisation.check_skipped(model, self.skip_modules)
            if left := quantisation.experts_left(model, self.dtype(precision)):
                log.warning("%s", left)

    def _check_stored(self, path: str, held: Stored) -> None:
        refuse_quantised(path, held, self.bits)
        if held.method and (differing := quantisation.kept(self, held.settings)):
            log.warning("model.path=%s is quantised already and keeps its own %s", path, differing)

    def quantization(self, compute_dtype: torch.dtype) -> BitsAndBytesConfig | None:
        return quantisation.config(self, compute_dtype)

    def attach(self, model: nn.Module, family: CausalLM) -> nn.Module:
        quantisation.check_skipped(model, self.skip_modules)
        return super().attach(model, family)


@contextmanager
def without_notices() -> Iterator[None]:
    """Keeps from our users what peft and transformers say about each other."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".*is_gradient_checkpointing", FutureWarning)
        yield
