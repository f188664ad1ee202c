"""A causal language model and its tokenizer, from a folder or the hub, and what its family does differently.

A family is a yaml of conf/model; code only where a family has a quirk: subclass CausalLM and override the
method in question.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from mft.errors import UserError, check_ranges, nearest, ranged
from mft.files.checksums import require_sound
from mft.model import gradient_checkpointing, model_folder
from mft.model.attention_kernel import Attention, choose_kernel, refuse_flash
from mft.model.introspect import base_of, logits, plain_head, recurrent
from mft.model.loading import Pretrained, load_model
from mft.model.model_folder import read_config
from mft.model.quantised_checkpoint import WeightFormat, refuse_quantised, weight_format
from mft.model.router_loss import coefficient, routed
from mft.model.special_tokens import add_new_tokens, check_new_tokens, set_special_tokens, widen_embeddings
from mft.model.transformers_private import model_class, unsplit_layers

if TYPE_CHECKING:
    import torch
    from torch import nn
    from transformers import BitsAndBytesConfig, PreTrainedModel, PreTrainedTokenizerBase

log = logging.getLogger(__name__)


@dataclass
class CausalLM:
    """Any causal LM of transformers."""

    public_name: ClassVar[str] = "causal_lm"

    path: str
    """Folder with config.json, *.safetensors and tokenizer, or hub name owner/name."""

    revision: str | None = None
    """Branch, tag or commit of a hub name; None = main."""

    attention: Attention = Attention.auto
    """Implementation of attention, see Attention."""

    gradient_checkpointing: Any = "auto"
    """auto | true | false: recompute activations in backward; auto = above 1 B parameters."""

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

    trust_remote_code: bool = False
    """Run code that comes with the checkpoint."""

    hint: str = ""
    """What to do when a local path is missing, appended to the error."""

    # ── checks, before anything is loaded ──

    def check(self) -> None:
        """Raises UserError for what can be known without loading: the path, the attention, gradient
        checkpointing."""
        self.checkpointing(parameters=0)
        check_ranges(self, "model")
        check_new_tokens(self.add_tokens, self.add_special_tokens)
        if self.attention not in Attention.__members__:
            raise UserError(
                f"model.attention={self.attention!r} is not one of {', '.join(Attention.__members__)}"
                f"{nearest(self.attention, Attention.__members__)}"
            )
        refuse_flash(self.attention)
        if self.trust_remote_code:
            self._warn_of_code()
        self._check_path()

    def _check_path(self) -> None:
        model_folder.check_path(self.path, self.hint)
        if type(self) is CausalLM:
            model_folder.check_type(self.path, self.trust_remote_code)
        if Path(self.location()).is_dir():
            self.weight_format()
            # the rest where the weights are read anyway
            require_sound(Path(self.location()), small_only=True)

    def _warn_of_code(self) -> None:
        log.warning("model.trust_remote_code=true: Python code that comes with %s will be run", self.path)

    def check_precision(self, precision: str) -> None:
        """Raises UserError for an attention that has no kernel in this precision (fp32, bf16 or fp16)."""
        refuse_flash(self.attention, precision)

    def check_rows(self, several: bool) -> None:
        """Raises UserError for rows of several samples where the model's layers would mix them, as far as the
        config.json of a folder tells."""
        if several and self.path and (what := recurrent(read_config(Path(self.path).expanduser()))):
            raise UserError(model_folder.no_packing(self.path, what))

    # ── where it comes from ──

    def location(self) -> str:
        """Returns where the checkpoint lies: an absolute folder, or the hub name."""
        path = Path(self.path).expanduser()
        return str(path.resolve()) if path.is_dir() else self.path

    def source(self) -> str:
        """Returns what is loaded: the location, or a native folder made of what lies there."""
        return self.location()

    def conversion(self) -> str:
        """Returns the words for `mft convert` that make `source` of `location`, "" where they are the
        same."""
        return ""

    def fingerprint(self) -> str:
        """Returns a string that differs for different weights: a hash of config, file names, sizes,
        safetensors headers and samples of their bytes for a folder; name@revision for a hub name."""
        folder = Path(self.location())
        if folder.is_dir():
            return model_folder.folder_fingerprint(folder)
        return f"{self.path}@{self.revision or 'main'}"

    def fingerprints(self) -> dict[str, str]:
        """Returns the hashes of all that is read of the model, by name (see `mft.config.identity.CONTENTS`).

        `fingerprint` is what adapters have in their mft.json; for a run more of the weights is read. Of a hub
        name there is only that.
        """
        folder = Path(self.location())
        if not folder.is_dir():
            return {"base model": self.fingerprint()}
        return model_folder.fingerprints(folder, self.fingerprint(), self.trust_remote_code)

    def width(self) -> int | None:
        """Returns the hidden size, as far as the config.json of a folder tells."""
        size = read_config(Path(self.path).expanduser()).get("hidden_size") if self.path else None
        return size if isinstance(size, int) else None

    def weight_format(self) -> WeightFormat:
        """Returns how the weights are stored, judged without loading any: a folder by its config.json and the
        headers of its files, a hub name by its config. Raises UserError for what cannot be read."""
        folder = Path(self.location())
        if folder.is_dir():
            return weight_format(f"model.path={self.path}", read_config(folder), folder)
        return weight_format(f"model.path={self.path}", self.config().to_dict(), None)

    def _pretrained(self, source: str) -> Pretrained:
        return Pretrained(self.path, source, self.revision, self.trust_remote_code)

    # ── tokenizer and config ──

    def tokenizer(self) -> PreTrainedTokenizerBase:
        """Returns the tokenizer with its EOS and pad token set (see `set_special_tokens`).

        Raises UserError when no EOS is known.
        """
        tokenizer = self.read_tokenizer()
        self._add_tokens(tokenizer)
        config_ids = lambda: getattr(self.config(), "eos_token_id", None)  # noqa: E731
        set_special_tokens(tokenizer, self.eos_token, self.pad_token, config_ids, self.path)
        return tokenizer

    def _add_tokens(self, tokenizer: PreTrainedTokenizerBase) -> list[int]:
        """Adds the new tokens and returns their ids."""
        return add_new_tokens(tokenizer, self.add_tokens, self.add_special_tokens)

    def new_tokens(self) -> dict[str, Any] | None:
        """Returns the settings of new tokens, None where there are none."""
        names = ("add_tokens", "add_special_tokens", "pad_to_multiple_of")
        added = self.add_tokens or self.add_special_tokens
        return {name: getattr(self, name) for name in names} if added else None

    def read_tokenizer(self) -> PreTrainedTokenizerBase:
        """Returns the tokenizer as the checkpoint has it; UserError for a folder without one."""
        from transformers import AutoTokenizer

        model_folder.check_vocabulary(self.path, Path(self.location()))
        tokenizer: PreTrainedTokenizerBase = self._pretrained(self.location()).read(AutoTokenizer)
        return tokenizer

    def config(self) -> Any:
        """Returns the transformers config of the model."""
        from transformers import AutoConfig

        return self._pretrained(self.location()).read(AutoConfig)

    # ── model ──

    def model(
        self,
        dtype: torch.dtype,
        quantization: BitsAndBytesConfig | None = None,
        device_map: Any = None,
        compute_dtype: torch.dtype | None = None,
    ) -> PreTrainedModel:
        """Returns the model in train mode, its weights in `dtype` or quantised.

        compute_dtype: what autocast will compute in, where that differs from dtype (float32 master weights
        under bf16); attention=auto needs it, since flash attention has no float32 kernel. Raises UserError
        for a checkpoint that is quantised already, unless by bitsandbytes to the bits that `quantization`
        asks for.
        """
        bits = (8 if quantization.load_in_8bit else 4) if quantization else 0
        refuse_quantised(self.path, self.weight_format(), bits)
        return self._load(dtype, quantization, device_map, compute_dtype)

    def dequantised(self, dtype: torch.dtype) -> PreTrainedModel:
        """Returns the model of a quantised checkpoint with the values that its numbers stand for, in
        `dtype`."""
        return self._load(dtype, dequantise=True)

    def _load(
        self,
        dtype: torch.dtype,
        quantization: BitsAndBytesConfig | None = None,
        device_map: Any = None,
        compute_dtype: torch.dtype | None = None,
        dequantise: bool = False,
    ) -> Any:
        from transformers import AutoModelForCausalLM

        attention: str | None = self.attention_for(compute_dtype or dtype, AutoModelForCausalLM)
        if attention == "sdpa" and self.attention == "auto":
            # sdpa where the model can (gemma 2's soft cap and the sinks of gpt-oss cannot), else eager
            attention = None
        weights = self.weight_format()
        config = self.config() if weights.method else None
        pretrained = self._pretrained(self.source())
        model = load_model(
            pretrained, weights, config, dtype, quantization, attention, device_map, dequantise
        )
        if self.new_tokens():
            widen_embeddings(model, self._add_tokens(self.read_tokenizer()), self.pad_to_multiple_of)
        model.train()
        return model

    def attention_for(self, dtype: torch.dtype, factory: Any) -> str:
        """Returns the attention implementation for computing in `dtype`, with auto resolved; factory: the
        class of the model, or AutoModelForCausalLM. Raises UserError where flash attention is asked for and
        cannot run."""
        return choose_kernel(self.attention, str(dtype), lambda: self._model_class(factory))

    def _model_class(self, factory: Any) -> Any:
        """Returns the class of the model; None where it comes with code of its own."""
        if not hasattr(factory, "_model_mapping"):
            return factory
        return model_class(self.config())

    def checkpointing(self, parameters: int) -> bool:
        """Returns gradient_checkpointing with auto resolved for a model of that many parameters."""
        return gradient_checkpointing.resolve(self.gradient_checkpointing, parameters)

    def checkpoint(self, model: nn.Module) -> bool:
        """Turns gradient checkpointing on where asked, on a plain or peft model, and returns whether it is
        on."""
        return gradient_checkpointing.turn_on(model, self.gradient_checkpointing)

    def layer_classes(self, model: nn.Module) -> list[str]:
        """Returns the class names of the decoder layers, the unit of sharding; model: plain or peft."""
        return list(self.shard_layers) or unsplit_layers(base_of(model))

    # ── the head ──

    def logits(self, model: nn.Module, hidden_nH: torch.Tensor) -> torch.Tensor:
        """Returns the logits [n, V] of final hidden states [n, H], as the model's own forward makes them."""
        return logits(base_of(model), hidden_nH)

    def plain_head(self, base: Any) -> bool:
        """Whether the logits are `hidden @ weight.T` and nothing else, so that the fused cross entropy may be
        used."""
        return plain_head(base)

    def router_weight(self, base: Any) -> float:
        """Returns the coefficient of the router's auxiliary loss: router_coef, else the config's, else 0.

        Raises UserError for a router_coef where there is no router.
        """
        if not routed(base):
            if self.router_coef:
                raise UserError(
                    f"model.router_coef={self.router_coef}: {type(base).__name__} has no router; remove it"
                )
            return 0.0
        return coefficient(base) if self.router_coef is None else float(self.router_coef)
