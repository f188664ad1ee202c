"""Families whose released checkpoints came with code of their own, loaded into native classes of transformers.

Each class here translates a config.json; the weights are translated while they are read (mft.model.native). Nothing of
the checkpoint's code is run.
"""

from __future__ import annotations

import json
import logging
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mft.errors import UserError, nearest
from mft.model.family import CausalLM

if TYPE_CHECKING:
    import torch
    from transformers import BitsAndBytesConfig, PreTrainedModel

log = logging.getLogger(__name__)

Values = dict[str, Any]


@dataclass
class Original(CausalLM):
    """A checkpoint in its original format. Subclasses say which `model_type` they read, and translate its config."""

    model_type = ""  # of the original config.json; not a field

    def original_config(self) -> Values:
        """Returns the checkpoint's config.json.

        Raises UserError when it is of another family or already quantised.
        """
        from transformers.utils import cached_file

        try:
            file = cached_file(self.source(), "config.json", revision=self.revision)
        except (OSError, ValueError) as error:
            raise UserError(f"model.path={self.path} cannot be loaded: {error}") from error
        values: Values = json.loads(Path(str(file)).read_text(encoding="utf-8"))
        self._check_config(values)
        return values

    def _check_path(self) -> None:
        super()._check_path()
        file = Path(self.path).expanduser() / "config.json"
        if file.is_file():
            self._check_config(json.loads(file.read_text(encoding="utf-8")))

    def _check_config(self, values: Values) -> None:
        if values.get("model_type") != self.model_type:
            raise UserError(
                f"model.path={self.path} is of model type {values.get('model_type')!r}, not {self.model_type!r}; "
                "use model=auto for a checkpoint that is already native"
            )
        if values.get("quantization_config") or values.get("quantization_bit"):
            raise UserError(
                f"model.path={self.path} holds weights that are quantised already; give the unquantised checkpoint, "
                "and peft=qlora to train beside 4 bits"
            )
        self.native(values)

    def _need(self, values: Values, **expected: Any) -> None:
        """Raises UserError where a setting differs from the only one that the native class can compute."""
        for name, value in expected.items():
            found = values.get(name, value)
            if found != value:
                raise UserError(
                    f"model.path={self.path}: {name}={found!r} in its config.json has no native counterpart, only "
                    f"{value!r} has"
                )

    def _get(self, values: Values, name: str) -> Any:
        if name not in values:
            raise UserError(f"model.path={self.path}: its config.json has no {name}, which {self.model_type} has")
        return values[name]

    def native(self, values: Values) -> tuple[str, str, Values]:
        """Returns the class of mft.model.native that reads the weights, the name of the config class, and the config's
        values. Raises UserError for a configuration that has no native counterpart."""
        raise NotImplementedError

    def config(self) -> Any:
        import transformers

        from mft.model import native

        values = self.original_config()
        _, name, translated = self.native(values)
        kept = ("bos_token_id", "eos_token_id", "pad_token_id", "tie_word_embeddings", "initializer_range")
        # Given even where absent: native configs name token ids of their own releases by default.
        translated |= {key: values.get(key) for key in kept[:3]} | {k: values[k] for k in kept[3:] if k in values}
        cls = getattr(native, name, None) or getattr(transformers, name)
        return cls(**{"tie_word_embeddings": False} | translated)

    def model(
        self,
        dtype: torch.dtype,
        quantization: BitsAndBytesConfig | None = None,
        device_map: Any = None,
        compute_dtype: torch.dtype | None = None,
    ) -> PreTrainedModel:
        from mft.model import native

        reader = getattr(native, self.native(self.original_config())[0])
        model = self._load(reader, dtype, quantization, device_map, compute_dtype, config=self.config())
        model.__class__ = reader.__bases__[0]
        model.config.architectures = [type(model).__name__]
        model.__dict__.pop("_weight_conversions", None)  # or saving would try to write the original names
        return model

    def options(self) -> dict[str, Any]:
        """Returns what, beside the path, says how the checkpoint is to be read; `from_options` takes it."""
        common = {f.name for f in fields(CausalLM)}
        own = {f.name: getattr(self, f.name) for f in fields(self) if f.name not in common}
        return {"class": type(self).__name__, **own}


def from_options(options: dict[str, Any], **arguments: Any) -> Original:
    """Returns the family that `Original.options` described."""
    classes = {cls.__name__: cls for cls in (ChatGLM, Qwen, Baichuan, Aquila)}
    return classes[options["class"]](**arguments, **{k: v for k, v in options.items() if k != "class"})


@dataclass
class ChatGLM(Original):
    """chatglm2, chatglm3 and codegeex2 -> Glm.

    rope_ratio: what the key of that name in config.json means, which the two generations disagree on: positions
    (divided by it, chatglm2) or base (multiplied by it, chatglm3). Without the key it does not matter.
    """

    rope_ratio: str = "base"
    model_type = "chatglm"

    def check(self) -> None:
        if self.rope_ratio not in ("positions", "base"):
            raise UserError(
                f"model.rope_ratio={self.rope_ratio!r} is not one of positions, base"
                f"{nearest(self.rope_ratio, ('positions', 'base'))}"
            )
        super().check()

    def native(self, values: Values) -> tuple[str, str, Values]:
        self._need(values, rmsnorm=True, post_layer_norm=True, apply_residual_connection_post_layernorm=False)
        self._need(values, add_bias_linear=False, pre_seq_len=None, fp32_residual_connection=False)
        self._need(values, hidden_dropout=0.0, interleaved_qkv=False, rotary_percent=0.5)
        grouped = bool(values.get("multi_query_attention", False))
        heads = self._get(values, "num_attention_heads")
        ratio = float(values.get("rope_ratio") or 1.0)
        rope = {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.5}
        if ratio != 1.0 and self.rope_ratio == "positions":
            rope |= {"rope_type": "linear", "factor": ratio}
        elif ratio != 1.0:
            rope["rope_theta"] = 10000.0 * ratio
        return (
            "OriginalChatGLMForCausalLM" if grouped else "OriginalChatGLMPerHeadForCausalLM",
            "GlmConfig",
            {
                "vocab_size": self._get(values, "padded_vocab_size"),
                "num_hidden_layers": self._get(values, "num_layers"),
                "hidden_size": self._get(values, "hidden_size"),
                "num_attention_heads": heads,
                "num_key_value_heads": self._get(values, "multi_query_group_num") if grouped else heads,
                "intermediate_size": self._get(values, "ffn_hidden_size"),
                "head_dim": self._get(values, "kv_channels"),
                "rms_norm_eps": self._get(values, "layernorm_epsilon"),
                "attention_bias": bool(values.get("add_qkv_bias")),
                "attention_dropout": values.get("attention_dropout", 0.0),
                "max_position_embeddings": self._get(values, "seq_length"),
                "rope_parameters": rope,
            },
        )


@dataclass
class Qwen(Original):
    """Qwen, the first generation -> Qwen2. Its dynamic NTK and logn scaling act only when answering beyond seq_length,
    and are left out."""

    model_type = "qwen"

    def native(self, values: Values) -> tuple[str, str, Values]:
        hidden, heads = self._get(values, "hidden_size"), self._get(values, "num_attention_heads")
        self._need(values, rotary_pct=1.0, no_bias=True, scale_attn_weights=True, emb_dropout_prob=0.0)
        self._need(values, kv_channels=hidden // heads)
        return (
            "OriginalQwenForCausalLM",
            "Qwen2Config",
            {
                "vocab_size": self._get(values, "vocab_size"),
                "hidden_size": hidden,
                "num_hidden_layers": self._get(values, "num_hidden_layers"),
                "num_attention_heads": heads,
                "num_key_value_heads": heads,
                "intermediate_size": self._get(values, "intermediate_size") // 2,
                "rms_norm_eps": self._get(values, "layer_norm_epsilon"),
                "attention_dropout": values.get("attn_dropout_prob", 0.0),
                "max_position_embeddings": values.get("max_position_embeddings", self._get(values, "seq_length")),
                "rope_parameters": {"rope_type": "default", "rope_theta": float(values.get("rotary_emb_base", 10000))},
                "use_sliding_window": False,
            },
        )


@dataclass
class Baichuan(Original):
    """Baichuan and Baichuan 2, 7B -> llama, 13B -> a llama without rotary positions and with ALiBi.

    All four share one model type. positions: auto (rope where config.json has max_position_embeddings, as the 7B
    releases do, else alibi) | rope | alibi; norm_head: auto (by the vocabulary: 125,696 tokens in Baichuan 2, 64,000
    before) | true | false; whether the rows of the output layer are scaled to length 1.
    """

    positions: str = "auto"
    norm_head: Any = "auto"
    model_type = "baichuan"

    def check(self) -> None:
        for name, allowed in (("positions", ("auto", "rope", "alibi")), ("norm_head", ("auto", "true", "false"))):
            value = str(getattr(self, name)).lower()
            if value not in allowed:
                raise UserError(f"model.{name}={value!r} is not one of {', '.join(allowed)}{nearest(value, allowed)}")
        super().check()

    def alibi(self, values: Values) -> bool:
        """Whether a checkpoint with this config.json has ALiBi instead of rotary positions."""
        guess = "rope" if "max_position_embeddings" in values else "alibi"
        if self.positions not in ("auto", guess):
            log.warning(
                "model.positions=%s, though config.json of %s looks like %s: the other reading loads without an error "
                "and computes nonsense",
                *(self.positions, self.path, guess),
            )
        return (guess if self.positions == "auto" else self.positions) == "alibi"

    def normalises(self, values: Values) -> bool:
        """Whether a checkpoint with this config.json has a normalising output layer."""
        asked = str(self.norm_head).lower()
        if asked != "auto":
            return asked == "true"
        if "z_loss_weight" in values:
            return True
        known = {125_696: True, 64_000: False}
        if values.get("vocab_size") not in known:
            raise UserError(
                f"model.path={self.path}: a vocabulary of {values.get('vocab_size')} does not tell Baichuan from "
                "Baichuan 2; say model.norm_head=true for Baichuan 2, false for Baichuan"
            )
        return known[values["vocab_size"]]

    def native(self, values: Values) -> tuple[str, str, Values]:
        self._need(values, z_loss_weight=0)
        self.normalises(values)
        heads = self._get(values, "num_attention_heads")
        names = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "rms_norm_eps")
        native = {name: self._get(values, name) for name in names} | {
            "num_attention_heads": heads,
            "num_key_value_heads": heads,
            "hidden_act": values.get("hidden_act", "silu"),
            "max_position_embeddings": values.get("max_position_embeddings", values.get("model_max_length", 4096)),
            "attention_bias": False,
            "mlp_bias": False,
        }
        if self.alibi(values):
            layers = native["num_hidden_layers"]
            native |= {"no_rope_layers": [0] * layers, "use_sliding_window": False}
            return "OriginalBaichuanAlibiForCausalLM", "AlibiConfig", native
        rope = {"rope_type": "default", "rope_theta": float(values.get("rope_theta", 10000.0))}
        return "OriginalBaichuanForCausalLM", "LlamaConfig", native | {"rope_parameters": rope}

    def attention_for(self, dtype: torch.dtype) -> str:
        if not self.alibi(self.original_config()):
            return super().attention_for(dtype)
        if self.attention not in ("auto", "sdpa"):
            raise UserError(f"model.attention={self.attention} cannot compute ALiBi; use model.attention=auto")
        from mft.model.attention import ALIBI

        return ALIBI

    def model(self, *arguments: Any, **options: Any) -> PreTrainedModel:
        from mft.model.native import NormHead

        model = super().model(*arguments, **options)
        if self.normalises(self.original_config()):
            model.get_output_embeddings().__class__ = NormHead
        return model


@dataclass
class Aquila(Original):
    """Aquila2 -> llama: names and config are llama's."""

    model_type = "aquila"

    def native(self, values: Values) -> tuple[str, str, Values]:
        names = ["vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "rms_norm_eps"]
        names += ["num_attention_heads", "max_position_embeddings"]
        native = {name: self._get(values, name) for name in names}
        native["num_key_value_heads"] = values.get("num_key_value_heads") or values["num_attention_heads"]
        scaling = dict(values.get("rope_scaling") or {})
        kind = scaling.pop("type", scaling.pop("rope_type", "default"))
        theta = float(values.get("rope_theta", 10000.0))
        native["rope_parameters"] = {"rope_type": kind, "rope_theta": theta, **scaling}
        native |= {"hidden_act": values.get("hidden_act", "silu"), "attention_bias": False, "mlp_bias": False}
        return "OriginalAquilaForCausalLM", "LlamaConfig", native
