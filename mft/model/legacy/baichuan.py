"""The four Baichuans, which share one model type: what tells them apart, and what they mean natively."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from mft.errors import UserError, check_choice
from mft.model.legacy.layout import BAICHUAN, Layout
from mft.model.legacy.original import SIZES, Original, Values

if TYPE_CHECKING:
    import torch
    from tokenizers import Tokenizer

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
        check_choice("model.positions", self.positions, ("auto", "rope", "alibi"))
        check_choice("model.norm_head", str(self.norm_head).lower(), ("auto", "true", "false"))
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
        size = values.get("vocab_size")
        if size not in (125_696, 64_000):
            raise self._refusal(
                f": a vocabulary of {size} does not tell Baichuan from Baichuan 2; set model.norm_head=true "
                "for Baichuan 2, false for Baichuan"
            )
        return size == 125_696

    def native(self, values: Values) -> tuple[Layout, str, Values]:
        self._need(values, z_loss_weight=0)
        if self.normalises(values):  # a tied matrix would be saved with its rows scaled
            self._need(values, tie_word_embeddings=False)
        self._divides(values, "num_attention_heads", "hidden_size")
        native = self._translated(values, *SIZES, "rms_norm_eps")
        native["num_key_value_heads"] = native["num_attention_heads"]
        length = values.get("max_position_embeddings", values.get("model_max_length", 4096))
        native |= {"max_position_embeddings": length, "hidden_act": values.get("hidden_act", "silu")}
        native |= {"attention_bias": False, "mlp_bias": False}
        if self.alibi(values):
            layers = native["num_hidden_layers"]
            native |= {"no_rope_layers": [0] * layers, "use_sliding_window": False}
            return BAICHUAN, "AlibiConfig", native
        rope = {"rope_type": "default", "rope_theta": float(values.get("rope_theta", 10000.0))}
        return BAICHUAN, "LlamaConfig", native | {"rope_parameters": rope}

    def attention_for(self, dtype: torch.dtype) -> str:
        if not self.alibi(self.original_config()):
            return super().attention_for(dtype)
        if self.attention not in ("auto", "sdpa"):
            raise UserError(
                f"model.attention={self.attention} cannot compute ALiBi; use model.attention=auto"
            )
        from mft.model.attention import ALIBI

        return ALIBI

    def native_tokenizer(self, file: Path, settings: Values) -> tuple[Tokenizer, Values]:
        from tokenizers import processors

        from mft.model.legacy.vocabulary import from_sentencepiece

        backend = from_sentencepiece(file)
        names: Values = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", "pad_token": None}
        for name, default in names.items():
            token = settings.get(name, default)
            names[name] = token = token["content"] if isinstance(token, dict) else token
            if token is not None and backend.token_to_id(token) is None:
                raise self._refusal(f": {name}={token!r} of its tokenizer_config.json is not in {file.name}")
        bos = [names["bos_token"]] if settings.get("add_bos_token", True) else []
        eos = [names["eos_token"]] if settings.get("add_eos_token", False) else []
        if bos or eos:
            backend.post_processor = processors.TemplateProcessing(
                single=[*bos, "$A", *eos],
                pair=[*bos, "$A", *eos, *bos, "$B", *eos],
                special_tokens=[(token, backend.token_to_id(token)) for token in {*bos, *eos}],
            )
        return backend, names
