"""Families whose checkpoints shipped their own code: how configs and vocabularies map to native ones."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

from mft.errors import check_choice
from mft.model.legacy.layout import AQUILA, CHATGLM, CHATGLM_PER_HEAD, QWEN, Layout
from mft.model.legacy.original import SIZES, Original, Values

if TYPE_CHECKING:
    from tokenizers import Tokenizer

log = logging.getLogger(__name__)


QWEN_WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|"
    r"\s+(?!\S)|\s+"
)
"""How Qwen cuts a text into words before it merges."""

QWEN_EARLY = {
    "n_embd": "hidden_size",
    "n_head": "num_attention_heads",
    "n_layer": "num_hidden_layers",
    "n_positions": "max_position_embeddings",
    "ffn_hidden_size": "intermediate_size",
    "padded_vocab_size": "vocab_size",
}
"""Keys of config.json in the first release of Qwen-7B, and what they were called later."""


@dataclass
class ChatGLM(Original):
    """chatglm2, chatglm3 and codegeex2 -> Glm."""

    public_name: ClassVar[str] = "chatglm"
    choice = "chatglm3"

    rope_ratio: str = "base"
    """What the key of that name in config.json means, which the two generations disagree on: positions
    (divided by it, chatglm2) or base (multiplied by it, chatglm3). Without the key it does not matter."""

    roles: bool = False
    """Whether the tokenizer has the four role tokens that came with chatglm3."""

    model_type = "chatglm"
    vocabulary = "tokenizer.model"

    def check(self) -> None:
        check_choice("model.rope_ratio", self.rope_ratio, ("positions", "base"))
        super().check()

    def native(self, values: Values) -> tuple[Layout, str, Values]:
        self._need(values, rmsnorm=True, post_layer_norm=True, apply_residual_connection_post_layernorm=False)
        self._need(values, add_bias_linear=False, pre_seq_len=None, fp32_residual_connection=False)
        self._need(values, hidden_dropout=0.0, interleaved_qkv=False, rotary_percent=0.5)
        native = self._translated(values, "hidden_size", "num_attention_heads", head_dim="kv_channels")
        native |= self._translated(
            values, num_hidden_layers="num_layers", max_position_embeddings="seq_length"
        )
        native |= self._translated(values, vocab_size="padded_vocab_size", rms_norm_eps="layernorm_epsilon")
        native |= self._translated(values, intermediate_size="ffn_hidden_size")
        layout, native["num_key_value_heads"] = CHATGLM_PER_HEAD, native["num_attention_heads"]
        if values.get("multi_query_attention"):
            self._divides(values, "multi_query_group_num", "num_attention_heads")
            layout, native["num_key_value_heads"] = CHATGLM, values["multi_query_group_num"]
        ratio = float(values.get("rope_ratio") or 1.0)
        rope = {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.5}
        if ratio != 1.0 and self.rope_ratio == "positions":
            rope |= {"rope_type": "linear", "factor": ratio}
        elif ratio != 1.0:
            rope["rope_theta"] = 10000.0 * ratio
        native |= {"rope_parameters": rope, "attention_bias": bool(values.get("add_qkv_bias"))}
        native["attention_dropout"] = values.get("attention_dropout", 0.0)
        native["tie_word_embeddings"] = False  # the original never ties, whatever its config.json says
        return layout, "GlmConfig", native

    def native_tokenizer(self, file: Path, settings: Values) -> tuple[Tokenizer, Values]:
        from tokenizers import Regex, decoders, processors

        from mft.model.legacy.vocabulary import from_sentencepiece

        extra = ["[MASK]", "[gMASK]", "[sMASK]", "sop", "eop"]
        extra += ["<|system|>", "<|user|>", "<|assistant|>", "<|observation|>"] if self.roles else []
        backend = from_sentencepiece(file, extra)
        size = backend.get_vocab_size()
        # As the vocabulary spells them: a name that is also a piece is in angle brackets.
        names = [str(backend.id_to_token(i)) for i in range(size - len(extra), size)]
        mask, gmask, smask, sop, eop, *roles = names
        start = [gmask, sop]
        # sop and eop are ids that no text becomes: as added tokens they would be cut out of "isopod" and
        # "people".
        backend.add_special_tokens([mask, gmask, smask, *roles])
        silent = decoders.Replace(Regex(rf"\A(?:{sop}|{eop})\z"), "")
        backend.decoder = decoders.Sequence([silent, backend.decoder])
        backend.post_processor = processors.TemplateProcessing(
            single=[*start, "$A"],
            pair=[*start, "$A", "$B", "</s>"],
            special_tokens=[(token, backend.token_to_id(token)) for token in (*start, "</s>")],
        )
        special = {"eos_token": "</s>", "unk_token": "<unk>", "pad_token": "<unk>"}
        return backend, special | {"padding_side": "left"}


@dataclass
class Qwen(Original):
    """Qwen, the first generation -> Qwen2. Its dynamic NTK and logn scaling act only when answering beyond
    seq_length, and are left out."""

    public_name: ClassVar[str] = "qwen"
    choice = "qwen"
    model_type = "qwen"
    vocabulary = "qwen.tiktoken"

    def check(self) -> None:
        super().check()
        values = self._folder_config()
        if longer := [name for name in ("use_dynamic_ntk", "use_logn_attn") if values.get(name)]:
            log.warning(
                "%s of %s is left out: past %s tokens (seq_length) the original scales positions and "
                "attention when it answers and evaluates, not when it trains",
                *(" and ".join(longer), self.path, values.get("seq_length")),
            )

    def native(self, values: Values) -> tuple[Layout, str, Values]:
        values = values | {QWEN_EARLY[name]: value for name, value in values.items() if name in QWEN_EARLY}
        self._divides(values, "num_attention_heads", "hidden_size")
        native = self._translated(values, *SIZES, rms_norm_eps="layer_norm_epsilon")
        self._need(values, visual=None, audio=None)  # Qwen-VL and Qwen-Audio call themselves qwen as well
        self._need(values, rotary_pct=1.0, no_bias=True, scale_attn_weights=True, emb_dropout_prob=0.0)
        self._need(values, attn_pdrop=0.0, embd_pdrop=0.0, resid_pdrop=0.0)  # names of the first release
        self._need(values, apply_residual_connection_post_layernorm=False, pos_emb="rotary")
        self._need(values, kv_channels=native["hidden_size"] // native["num_attention_heads"])
        native["num_key_value_heads"] = native["num_attention_heads"]
        native["intermediate_size"] //= 2  # the original counts both halves of its gated MLP
        native["attention_dropout"] = values.get("attn_dropout_prob", 0.0)
        length = values.get("max_position_embeddings", self._get(values, "seq_length"))
        theta = float(values.get("rotary_emb_base", 10000))
        native["rope_parameters"] = {"rope_type": "default", "rope_theta": theta}
        native |= {"max_position_embeddings": length, "use_sliding_window": False}
        return QWEN, "Qwen2Config", native

    def native_tokenizer(self, file: Path, settings: Values) -> tuple[Tokenizer, Values]:
        from tokenizers import normalizers

        from mft.model.legacy.vocabulary import from_tiktoken

        backend = from_tiktoken(file, QWEN_WORDS)
        backend.normalizer = normalizers.NFC()
        backend.add_special_tokens(["<|endoftext|>", "<|im_start|>", "<|im_end|>"])
        backend.add_special_tokens([f"<|extra_{i}|>" for i in range(205)])
        return backend, {"eos_token": "<|endoftext|>", "pad_token": "<|extra_1|>"}


@dataclass
class Aquila(Original):
    """Aquila2 -> llama: names and config are llama's."""

    public_name: ClassVar[str] = "aquila"
    choice = "aquila2"
    model_type = "aquila"

    def native(self, values: Values) -> tuple[Layout, str, Values]:
        native = self._translated(values, *SIZES, "rms_norm_eps", "max_position_embeddings")
        self._divides(values, "num_attention_heads", "hidden_size")
        native["num_key_value_heads"] = values["num_attention_heads"]
        if values.get("num_key_value_heads"):
            self._divides(values, "num_key_value_heads", "num_attention_heads")
            native["num_key_value_heads"] = values["num_key_value_heads"]
        # older configs say type where newer ones say rope_type
        scaling = dict(values.get("rope_scaling") or {})
        kind = scaling.pop("type", scaling.pop("rope_type", "default"))
        if kind not in ("default", "linear"):
            setting = f"rope_scaling of type {kind!r} in its config.json"
            raise self._refusal(f": {setting} has no native counterpart, only 'linear' has")
        theta = float(values.get("rope_theta", 10000.0))
        native["rope_parameters"] = {"rope_type": kind, "rope_theta": theta, **scaling}
        native |= {"hidden_act": values.get("hidden_act", "silu"), "attention_bias": False, "mlp_bias": False}
        return AQUILA, "LlamaConfig", native
