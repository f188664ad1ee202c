"""The four Baichuans, which share one model type: what tells them apart, and what they mean natively."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from mft.errors import UserError, nearest
from mft.model.legacy.layout import BAICHUAN, Layout
from mft.model.legacy.original import Original, Values

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedTokenizerBase

log = logging.getLogger(__name__)


@dataclass
class Baichuan(Original):
    """Baichuan and Baichuan 2, which share one model type: 7B -> llama, 13B -> a llama without rotary
    positions and with ALiBi."""

    public_name: ClassVar[str] = "baichuan"
    choice = "baichuan"

    positions: str = "auto"
    """auto | rope | alibi; auto = rope where config.json has max_position_embeddings, as the 7B releases
    do."""

    norm_head: Any = "auto"
    """auto | true | false: whether the rows of the output layer are scaled to length 1; auto = by the
    vocabulary: 125,696 tokens in Baichuan 2, 64,000 before."""

    model_type = "baichuan"
    vocabulary = "tokenizer.model"

    def check(self) -> None:
        for name, allowed in (
            ("positions", ("auto", "rope", "alibi")),
            ("norm_head", ("auto", "true", "false")),
        ):
            value = str(getattr(self, name)).lower()
            if value not in allowed:
                raise UserError(
                    f"model.{name}={value!r} is not one of {', '.join(allowed)}{nearest(value, allowed)}"
                )
        super().check()

    def alibi(self, values: Values) -> bool:
        """Whether a checkpoint with this config.json has ALiBi instead of rotary positions."""
        guess = "rope" if "max_position_embeddings" in values else "alibi"
        if self.positions not in ("auto", guess):
            log.warning(
                "model.positions=%s, though config.json of %s looks like %s: the other reading loads "
                "without an error and computes nonsense",
                *(self.positions, self.path, guess),
            )
        return (guess if self.positions == "auto" else self.positions) == "alibi"

    def normalises(self, values: Values) -> bool:
        """Whether a checkpoint with this config.json has a normalising output layer."""
        value = str(self.norm_head).lower()
        if value != "auto":
            return value == "true"
        if "z_loss_weight" in values:
            return True
        by_vocabulary = {125_696: True, 64_000: False}
        if values.get("vocab_size") not in by_vocabulary:
            raise UserError(
                f"model.path={self.path}: a vocabulary of {values.get('vocab_size')} does not tell "
                "Baichuan from Baichuan 2; say model.norm_head=true for Baichuan 2, false for Baichuan"
            )
        return by_vocabulary[values["vocab_size"]]

    def native(self, values: Values) -> tuple[Layout, str, Values]:
        self._need(values, z_loss_weight=0)
        if self.normalises(values):  # a tied matrix would be saved with its rows scaled
            self._need(values, tie_word_embeddings=False)
        self._divides(values, "num_attention_heads", "hidden_size")
        heads = self._get(values, "num_attention_heads")
        names = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "rms_norm_eps")
        native = {name: self._get(values, name) for name in names} | {
            "num_attention_heads": heads,
            "num_key_value_heads": heads,
            "hidden_act": values.get("hidden_act", "silu"),
            "max_position_embeddings": values.get(
                "max_position_embeddings", values.get("model_max_length", 4096)
            ),
            "attention_bias": False,
            "mlp_bias": False,
        }
        if self.alibi(values):
            layers = native["num_hidden_layers"]
            native |= {"no_rope_layers": [0] * layers, "use_sliding_window": False}
            return BAICHUAN, "AlibiConfig", native
        rope = {"rope_type": "default", "rope_theta": float(values.get("rope_theta", 10000.0))}
        return BAICHUAN, "LlamaConfig", native | {"rope_parameters": rope}

    def attention_for(self, dtype: torch.dtype, factory: Any) -> str:
        if not self.alibi(self.original_config()):
            return super().attention_for(dtype, factory)
        if self.attention not in ("auto", "sdpa"):
            raise UserError(
                f"model.attention={self.attention} cannot compute ALiBi; use model.attention=auto"
            )
        from mft.model.attention import ALIBI

        return ALIBI

    def native_tokenizer(self, file: Path, settings: Values) -> PreTrainedTokenizerBase:
        from tokenizers import processors
        from transformers import PreTrainedTokenizerFast

        from mft.model.legacy.vocabulary import from_sentencepiece

        backend = from_sentencepiece(file)
        names: Values = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", "pad_token": None}
        for name in names:
            given = settings.get(name, names[name])
            names[name] = given["content"] if isinstance(given, dict) else given
            if names[name] is not None and backend.token_to_id(names[name]) is None:
                raise UserError(
                    f"model.path={self.path}: {name}={names[name]!r} of its tokenizer_config.json is not "
                    f"in {file.name}"
                )
        bos = [names["bos_token"]] if settings.get("add_bos_token", True) else []
        eos = [names["eos_token"]] if settings.get("add_eos_token", False) else []
        if bos or eos:
            backend.post_processor = processors.TemplateProcessing(
                single=[*bos, "$A", *eos],
                pair=[*bos, "$A", *eos, *bos, "$B", *eos],
                special_tokens=[(token, backend.token_to_id(token)) for token in {*bos, *eos}],
            )
        return PreTrainedTokenizerFast(tokenizer_object=backend, clean_up_tokenization_spaces=False, **names)
