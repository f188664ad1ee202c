"""A causal language model and its tokenizer, from a folder or the hub, and what its family does differently.

A family is a yaml of conf/model; code only where a family has a quirk: subclass CausalLM and override the method in
question.
"""

from __future__ import annotations

import importlib
import logging
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from mft.errors import UserError, nearest
from mft.files.checksums import require_sound
from mft.model.attention_kernel import Attention, choose_kernel, refuse_flash
from mft.model.introspect import base_of, head_logits, head_quirks, parameter_count, recurrent
from mft.model.model_folder import (
    TOKENIZER_FILES,
    check_path,
    check_type,
    check_vocabulary,
    contents_fingerprint,
    folder_fingerprint,
    no_packing,
    read_config,
    weights_fingerprint,
)
from mft.model.quantised_checkpoint import (
    WeightFormat,
    cast_unquantised,
    loading_config,
    refuse_quantised,
    save_as_in_memory,
    weight_format,
)
from mft.model.router_loss import coefficient, routed
from mft.model.special_tokens import add_new_tokens, check_new_tokens, set_special_tokens, widen_embeddings
from mft.model.weights import check_loaded

if TYPE_CHECKING:
    import torch
    from torch import nn
    from transformers import BitsAndBytesConfig, PreTrainedModel, PreTrainedTokenizerBase

log = logging.getLogger(__name__)

CHECKPOINTING_ABOVE = 1_000_000_000
"""Parameters above which gradient_checkpointing=auto turns checkpointing on."""


@dataclass
class CausalLM:
    """Any causal LM of transformers.

    path: folder or hub name; revision: branch, tag or commit of a hub name; attention: see Attention;
    gradient_checkpointing: auto | true | false; eos_token, pad_token: override the tokenizer's; add_tokens,
    add_special_tokens: new ones, which are trained; pad_to_multiple_of: of the rows then; lora_targets: module
    names adapted by default ([] = all linear layers); shard_layers: class names of decoder layers ([] = the model's own
    list); router_coef: weight of a mixture of experts' balance loss (None = the model's own); trust_remote_code: run
    code that comes with the checkpoint; hint: what to do when a local path is missing.
    """

    public_name: ClassVar[str] = "causal_lm"

    path: str
    revision: str | None = None
    attention: Attention = Attention.auto
    gradient_checkpointing: Any = "auto"
    eos_token: str | None = None
    pad_token: str | None = None
    add_tokens: list[str] = field(default_factory=list)
    add_special_tokens: list[str] = field(default_factory=list)
    pad_to_multiple_of: int = 64
    lora_targets: list[str] = field(default_factory=list)
    shard_layers: list[str] = field(default_factory=list)
    router_coef: float | None = None
    trust_remote_code: bool = False
    hint: str = ""

    # ── checks, before anything is loaded ──

    def check(self) -> None:
        """Raises UserError for what can be known without loading: the path, the attention, gradient checkpointing."""
        self.checkpointing(parameters=0)
        check_new_tokens(self.add_tokens, self.add_special_tokens, self.pad_to_multiple_of)
        if self.router_coef is not None and not self.router_coef >= 0:
            raise UserError(f"model.router_coef={self.router_coef}: it must be 0 (no balance loss) or larger")
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
        check_path(self.path, self.hint)
        if type(self) is CausalLM:
            check_type(self.path, self.trust_remote_code)
        if Path(self.source()).is_dir():
            self.weight_format()
            require_sound(Path(self.source()), small_only=True)  # the rest where the weights are read anyway

    def _warn_of_code(self) -> None:
        log.warning("model.trust_remote_code=true: Python code that comes with %s will be run", self.path)

    def check_precision(self, precision: str) -> None:
        """Raises UserError for an attention that has no kernel in this precision (fp32, bf16 or fp16)."""
        refuse_flash(self.attention, precision)

    def check_rows(self, several: bool) -> None:
        """Raises UserError for rows of several samples where the model's layers would mix them, as far as the
        config.json of a folder tells."""
        if several and self.path and (what := recurrent(read_config(Path(self.path).expanduser()))):
            raise UserError(no_packing(self.path, what))

    # ── where it comes from ──

    def source(self) -> str:
        """Returns what from_pretrained takes: an absolute folder, or the hub name."""
        path = Path(self.path).expanduser()
        return str(path.resolve()) if path.is_dir() else self.path

    def fingerprint(self) -> str:
        """Returns a string that differs for different weights: a hash of config, file names, sizes, safetensors headers
        and samples of their bytes for a folder; name@revision for a hub name."""
        source = Path(self.source())
        return folder_fingerprint(source) if source.is_dir() else f"{self.path}@{self.revision or 'main'}"

    def fingerprints(self) -> dict[str, str]:
        """Returns the hashes of all that is read of the model, by name (see `mft.config.identity.CONTENTS`).

        `fingerprint` is what adapters have in their mft.json; for a run more of the weights is read. Of a hub
        name there is only that.
        """
        source = Path(self.source())
        found = {"base model": self.fingerprint()}
        if source.is_dir():
            found["base model"] = weights_fingerprint(source, found["base model"])
            found["tokenizer"] = contents_fingerprint(source, TOKENIZER_FILES)
            if self.trust_remote_code:
                found["code"] = contents_fingerprint(source, ("**/*.py",))
        return found

    def width(self) -> int | None:
        """Returns the hidden size, as far as the config.json of a folder tells."""
        size = read_config(Path(self.path).expanduser()).get("hidden_size") if self.path else None
        return size if isinstance(size, int) else None

    def weight_format(self) -> WeightFormat:
        """Returns how the weights are stored, judged without loading any: a folder by its config.json and the headers
        of its files, a hub name by its config. Raises UserError for what cannot be read."""
        folder = Path(self.source())
        if folder.is_dir():
            return weight_format(f"model.path={self.path}", read_config(folder), folder)
        return weight_format(f"model.path={self.path}", self.config().to_dict(), None)

    def _from_pretrained(self, factory: Any, **arguments: Any) -> Any:
        from huggingface_hub.errors import StrictDataclassError

        if str(read_config(Path(self.source())).get("model_type")).startswith("mft_"):  # saved with a class of ours
            importlib.import_module("mft.model.legacy.native")
        try:
            return factory.from_pretrained(
                self.source(), revision=self.revision, trust_remote_code=self.trust_remote_code, **arguments
            )
        except (OSError, ValueError) as error:
            # transformers reports what a person got wrong (name, network, licence, no safetensors) as these two.
            told = " ".join(str(error).split())
            if "couldn't connect" in told:
                told = "there is no such folder, the hub cannot be reached, and its files were never fetched before"
            raise UserError(f"model.path={self.path} cannot be loaded: {told}") from error
        except StrictDataclassError as error:  # a value of config.json
            raise UserError(f"model.path={self.path}: config.json: {str(error).splitlines()[-1].strip()}") from error

    # ── tokenizer ──

    def tokenizer(self) -> PreTrainedTokenizerBase:
        """Returns the tokenizer with its EOS and pad token set (see `set_special_tokens`).

        Raises UserError when no EOS is known."""
        tokenizer = self.read_tokenizer()
        self._add_tokens(tokenizer)
        set_special_tokens(
            tokenizer,
            self.eos_token,
            self.pad_token,
            lambda: getattr(self.config(), "eos_token_id", None),
            self.path,
        )
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

        check_vocabulary(self.path, Path(self.source()))
        return self._from_pretrained(AutoTokenizer)

    def config(self) -> Any:
        """Returns the transformers config of the model."""
        from transformers import AutoConfig

        return self._from_pretrained(AutoConfig)

    # ── model ──

    def model(
        self,
        dtype: torch.dtype,
        quantization: BitsAndBytesConfig | None = None,
        device_map: Any = None,
        compute_dtype: torch.dtype | None = None,
    ) -> PreTrainedModel:
        """Returns the model in train mode, its weights in `dtype` or quantised.

        compute_dtype: what autocast will compute in, where that differs from dtype (float32 master weights under bf16);
        attention=auto needs it, since flash attention has no float32 kernel. Raises UserError for a checkpoint that is
        quantised already, unless by bitsandbytes to the bits that `quantization` asks for.
        """
        from transformers import AutoModelForCausalLM

        return self._load(AutoModelForCausalLM, dtype, quantization, device_map, compute_dtype)

    def dequantised(self, dtype: torch.dtype) -> PreTrainedModel:
        """Returns the model of a quantised checkpoint with the values that its numbers stand for, in `dtype`."""
        from transformers import AutoModelForCausalLM

        return self._load(AutoModelForCausalLM, dtype, None, None, None, dequantise=True)

    def _load(
        self,
        factory: Any,
        dtype: Any,
        quantization: Any,
        device_map: Any,
        compute_dtype: Any,
        dequantise: bool = False,
        **arguments: Any,
    ) -> Any:
        asked = self.attention_for(compute_dtype or dtype, factory)
        weights = self.weight_format()
        if not dequantise:
            refuse_quantised(self.path, weights, (8 if quantization.load_in_8bit else 4) if quantization else 0)
        if weights.method:
            arguments["config"] = loading_config(
                self.config(), weights, getattr(quantization, "bnb_4bit_compute_dtype", None)
            )
        elif quantization:  # None would take the checkpoint's own away
            arguments["quantization_config"] = quantization
        model, found = self._from_pretrained(
            factory,
            output_loading_info=True,
            dtype=dtype,
            device_map=device_map,
            # None: sdpa where the model can (gemma 2's soft cap and the sinks of gpt-oss cannot), else eager
            attn_implementation=None if asked == "sdpa" and self.attention == "auto" else asked,
            use_safetensors=True,
            ignore_mismatched_sizes=True,  # they are refused here, by name
            **arguments,
        )
        check_loaded(Path(self.source()), model, found)
        if fetched := self._fetched():
            weight_format(f"model.path={self.path}", read_config(fetched), fetched)
        if weights.bits and dequantise:
            model = model.dequantize(dtype)
        if dequantise:
            cast_unquantised(model, dtype)
        if weights.method:
            save_as_in_memory(model)
        # On CPUs with AVX512-BF16 bitsandbytes repacks 4-bit weights in place at the first evaluation, after which
        # training gradients are wrong (relative error 0.73) while the loss looks right. from_pretrained returns eval
        # mode.
        for module in model.modules():
            if hasattr(module, "support_avx512bf16_for_cpu"):
                module.support_avx512bf16_for_cpu = False
        if self.new_tokens():
            widen_embeddings(model, self._add_tokens(self.read_tokenizer()), self.pad_to_multiple_of)
        model.train()
        return model

    def _fetched(self) -> Path | None:
        """Returns where the files of a hub name lie once it was loaded, None for a folder."""
        from transformers.utils import cached_file

        if Path(self.source()).is_dir():
            return None
        where = {"revision": self.revision, "local_files_only": True}
        file = cached_file(self.source(), "config.json", _raise_exceptions_for_missing_entries=False, **where)
        return Path(file).parent if file else None

    def attention_for(self, dtype: torch.dtype, factory: Any) -> str:
        """Returns the attention implementation for computing in `dtype`, with auto resolved; factory: the class of the
        model, or AutoModelForCausalLM. Raises UserError where flash attention is asked for and cannot run."""
        return choose_kernel(self.attention, str(dtype), lambda: self._model_class(factory))

    def _model_class(self, factory: Any) -> Any:
        """Returns the class of the model; None where it comes with code of its own."""
        if not hasattr(factory, "_model_mapping"):
            return factory
        return factory._model_mapping.get(type(self.config()), None)

    def checkpointing(self, parameters: int) -> bool:
        """Returns gradient_checkpointing with auto resolved for a model of that many parameters."""
        options = {"auto": parameters > CHECKPOINTING_ABOVE, "true": True, "false": False}
        asked = str(self.gradient_checkpointing).lower()
        if asked not in options:
            raise UserError(
                f"model.gradient_checkpointing={self.gradient_checkpointing!r} is not one of auto, true, false"
                f"{nearest(asked, options)}"
            )
        return options[asked]

    def checkpoint(self, model: nn.Module) -> bool:
        """Turns gradient checkpointing on where asked, on a plain or peft model, and returns whether it is on."""
        on = self.checkpointing(parameter_count(model))
        if on and not base_of(model).supports_gradient_checkpointing:
            name = type(base_of(model)).__name__
            if str(self.gradient_checkpointing).lower() == "true":
                raise UserError(f"model.gradient_checkpointing=true: a {name} of transformers cannot; choose false")
            log.warning("model.gradient_checkpointing=auto is off: a %s of transformers cannot", name)
            return False
        if on:
            # Non-reentrant: the reentrant kind loses gradients of adapters behind a frozen embedding and breaks DDP.
            base_of(model).activation_checkpointing_enable({"use_reentrant": False})
        return on

    def layer_classes(self, model: nn.Module) -> list[str]:
        """Returns the class names of the decoder layers, the unit of sharding; model: plain or peft."""
        return list(self.shard_layers) or sorted(base_of(model)._no_split_modules or [])

    # ── the head ──

    def logits(self, model: nn.Module, hidden_nH: torch.Tensor) -> torch.Tensor:
        """Returns the logits [n, V] of final hidden states [n, H], as the model's own forward makes them."""
        import torch

        base = base_of(model)
        logits_nV: torch.Tensor = head_logits(base.get_output_embeddings(), hidden_nH)
        for name, value in head_quirks(base).items():
            if name == "logits_scaling":
                logits_nV = logits_nV / value
            elif name == "logit_scale":
                logits_nV = logits_nV * value
            else:
                logits_nV = torch.tanh(logits_nV / value) * value
        return logits_nV

    def plain_head(self, base: Any) -> bool:
        """Whether the logits are `hidden @ weight.T` and nothing else, so that the fused cross entropy may be used."""
        from torch import nn

        head = base.get_output_embeddings()
        return type(head) is nn.Linear and head.bias is None and not head_quirks(base)

    def router_weight(self, base: Any) -> float:
        """Returns the coefficient of the router's auxiliary loss: router_coef, else the config's, else 0.

        Raises UserError for a router_coef where there is no router.
        """
        if not routed(base):
            if self.router_coef:
                raise UserError(f"model.router_coef={self.router_coef}: {type(base).__name__} has no router; remove it")
            return 0.0
        return coefficient(base) if self.router_coef is None else float(self.router_coef)
