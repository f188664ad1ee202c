"""A causal language model and its tokenizer, from a folder or the hub, and what is specific to its family.

A family is a yaml of conf/model; code only where a family has a quirk: subclass CausalLM and override the
method in question.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from mft.errors import UserError, check_choice, check_ranges, ranged
from mft.files.checksums import require_sound
from mft.model import checkpointing, model_folder
from mft.model.attention_kernel import Attention, choose_kernel, refuse_flash
from mft.model.checkpoint_source import CheckpointSource
from mft.model.introspect import base_of, logits, parameter_count, plain_head, recurrent
from mft.model.loading import load_model
from mft.model.quantised_checkpoint import refuse_quantised
from mft.model.router_loss import coefficient, routed
from mft.model.special_tokens import add_new_tokens, check_new_tokens, set_special_tokens, widen_embeddings
from mft.model.transformers_private import model_class, unsplit_layers

if TYPE_CHECKING:
    import torch
    from torch import nn
    from transformers import BitsAndBytesConfig, PreTrainedModel, PreTrainedTokenizerBase

log = logging.getLogger(__name__)

CHECKPOINTING_ABOVE = 1_000_000_000
"""Parameters above which gradient_checkpointing=auto is on on a CPU: a third of the memory, 0.7 of the
speed."""


@dataclass
class CausalLM(CheckpointSource):
    """Any causal LM of transformers."""

    public_name: ClassVar[str] = "causal_lm"
    code_notice: ClassVar[str] = "model.trust_remote_code=true: Python code that comes with %s will be run"

    attention: Attention = Attention.auto
    """Implementation of attention, see Attention."""

    gradient_checkpointing: Any = "auto"
    """auto | true | false | k: recompute activations in backward, of all, no, or every k-th layer; auto = of
    as few as the GPU's memory asks for, on a CPU of all above 1 B parameters."""

    fused: bool = True
    """Compute norms and gated MLPs as one function each, where transformers writes them as in llama; false: step
    by step, equal to rounding."""

    eos_token: str | None = None
    """Token that ends an answer; None = the tokenizer's, else that of config.json."""

    pad_token: str | None = None
    """Token that fills rows; None = the tokenizer's, else one made for it, else unk, else EOS."""

    add_tokens: list[str] = field(default_factory=list)
    """New tokens; their rows of embedding and head are trained."""

    add_special_tokens: list[str] = field(default_factory=list)
    """The same for tokens that are left out of answers."""

    pad_to_multiple_of: int = ranged(64, min=1)
    """Of the embedding's number of rows where new tokens make it grow."""

    lora_targets: list[str] = field(default_factory=list)
    """Names of the modules that adapters go to by default; [] = all linear layers."""

    shard_layers: list[str] = field(default_factory=list)
    """Class names of the decoder layers, the unit of sharding; [] = the model's own list."""

    router_coef: float | None = ranged(None, min=0)
    """Weight of a mixture of experts' balance loss; None = the model's own, 0 = off."""

    # ── checks, before anything is loaded ──

    def check(self) -> None:
        """Raises UserError for what can be known without loading: settings, path, headers of weights."""
        self._check_settings()
        self._check_path()

    def check_without_weights(self) -> None:
        """The same; a folder needs no more than its config.json."""
        if not model_folder.is_config_alone(self.path):
            self.check()
            return
        self._check_settings()
        model_folder.check_path(self.path, self.hint, weights=False)
        self._check_type()

    def _check_settings(self) -> None:
        checkpointing.layers_between(self.gradient_checkpointing)
        check_choice("model.attention", self.attention, Attention.__members__)
        check_ranges(self, "model")
        check_new_tokens(self.add_tokens, self.add_special_tokens)
        refuse_flash(self.attention)
        if self.trust_remote_code:
            log.warning(self.code_notice, self.path)

    def _check_type(self) -> None:
        if type(self) is CausalLM:  # subclasses read model types that transformers does not have
            model_folder.check_type(self.path, self.trust_remote_code)

    def _check_path(self) -> None:
        model_folder.check_path(self.path, self.hint)
        self._check_type()
        folder = Path(self.location())
        if folder.is_dir():
            self.weight_format()
            # Large files are verified later, where their weights are read anyway.
            require_sound(folder, small_only=True)
        else:
            model_folder.check_reachable(self.path, self.revision)

    def check_precision(self, precision: str) -> None:
        """Raises UserError for an attention that has no kernel in this precision (fp32, bf16 or fp16)."""
        refuse_flash(self.attention, precision)

    def check_rows(self, several: bool) -> None:
        """Raises UserError for rows of several samples where the model's layers would mix them, as far as the
        config.json of a folder tells."""
        if several and (layers := recurrent(self._folder_config())):
            raise UserError(model_folder.no_packing(self.path, layers))

    # ── tokenizer ──

    def tokenizer(self) -> PreTrainedTokenizerBase:
        """Returns the tokenizer with its new tokens, EOS and pad token (see `set_special_tokens`).

        Raises UserError when no EOS is known.
        """
        tokenizer = self.read_tokenizer()
        self._add_tokens(tokenizer)
        set_special_tokens(tokenizer, self.eos_token, self.pad_token, self.config, self.path)
        return tokenizer

    def _add_tokens(self, tokenizer: PreTrainedTokenizerBase) -> list[int]:
        """Adds the new tokens and returns their ids."""
        return add_new_tokens(tokenizer, self.add_tokens, self.add_special_tokens)

    def new_tokens(self) -> dict[str, Any] | None:
        """Returns the settings of new tokens, None without any."""
        names = ("add_tokens", "add_special_tokens", "pad_to_multiple_of")
        added = self.add_tokens or self.add_special_tokens
        return {name: getattr(self, name) for name in names} if added else None

    # ── model ──

    def model(
        self,
        dtype: torch.dtype,
        quantization: BitsAndBytesConfig | None = None,
        compute_dtype: torch.dtype | None = None,
        dequantise: bool = False,
        device: torch.device | None = None,
    ) -> PreTrainedModel:
        """Returns the model in train mode, its weights in `dtype` or quantised.

        compute_dtype: what autocast will compute in, where that differs from dtype (float32 master weights
        under bf16); attention=auto needs it, since flash attention has no float32 kernel. Raises UserError
        for a checkpoint that is quantised already, unless by bitsandbytes to the bits that `quantization`
        asks for. dequantise: turns its weights into real values instead. device: where the weights are put as
        they are read, None = where transformers does.
        """
        weights = self.weight_format()
        bits = (8 if quantization.load_in_8bit else 4) if quantization else 0
        if not dequantise:
            refuse_quantised(self.path, weights, bits)
        attention: str | None = self.attention_for(compute_dtype or dtype)
        if attention == "sdpa" and self.attention == "auto":
            # None leaves it to transformers: sdpa where the model can, else eager (gemma 2's soft cap, the
            # sinks of gpt-oss).
            attention = None
        config = self.config() if weights.method else None
        pretrained = self._pretrained(self.source())
        model = load_model(pretrained, weights, config, dtype, quantization, attention, dequantise, device)
        if self.new_tokens():
            widen_embeddings(model, self._add_tokens(self.read_tokenizer()), self.pad_to_multiple_of)
        model.train()
        return model

    def attention_for(self, dtype: torch.dtype) -> str:
        """Returns the attention implementation for computing in `dtype`, with auto resolved.

        Raises UserError where flash attention is set and cannot run.
        """
        return choose_kernel(self.attention, str(dtype), lambda: model_class(self.config()))

    def checkpoint(self, model: nn.Module, automatic: Callable[[], int] | None = None) -> int:
        """Turns gradient checkpointing (recompute activations in backward instead of keeping them) on as the
        setting says, on a plain or peft model; returns of how many layers one is recomputed, 0 = none.

        automatic: decides for auto, None = by the number of weights. Raises UserError where the setting
        demands it of a model that cannot; auto warns.
        """
        base, set_to = base_of(model), checkpointing.layers_between(self.gradient_checkpointing)
        every = set_to
        if every is None:
            every = automatic() if automatic else int(parameter_count(model) > CHECKPOINTING_ABOVE)
        name, classes = type(base).__name__, self.layer_classes(model)
        if every == 0 or checkpointing.enable(base, classes, every):
            return every
        if set_to is not None:
            only = "; choose true or false" if base.supports_gradient_checkpointing else "; choose false"
            shown = str(self.gradient_checkpointing).lower()
            raise UserError(f"{checkpointing.SETTING}={shown}: {name} does not support it{only}")
        if base.supports_gradient_checkpointing:
            return int(checkpointing.enable(base, classes, 1))
        log.warning("%s=auto is off: %s does not support it", checkpointing.SETTING, name)
        return 0

    def layer_classes(self, model: nn.Module) -> list[str]:
        """Returns the class names of the decoder layers, the unit of sharding; model: plain or peft."""
        return list(self.shard_layers) or unsplit_layers(base_of(model))

    # ── the head ──

    def logits(self, model: nn.Module, hidden_nH: torch.Tensor) -> torch.Tensor:
        """Returns the logits [n, V] of final hidden states [n, H], as the model's own forward makes them."""
        return logits(base_of(model), hidden_nH)

    def plain_head(self, base: PreTrainedModel) -> bool:
        """Whether the logits are `hidden @ weight.T` and nothing else, as the fused cross entropy takes for
        granted."""
        return plain_head(base)

    def router_weight(self, base: PreTrainedModel) -> float:
        """Returns the coefficient of the router's auxiliary loss: router_coef, else the config's, else 0.

        Raises UserError for a router_coef if the model has no router.
        """
        if routed(base):
            return coefficient(base) if self.router_coef is None else float(self.router_coef)
        if self.router_coef:
            name = type(base).__name__
            raise UserError(f"model.router_coef={self.router_coef}: {name} has no router; remove it")
        return 0.0
