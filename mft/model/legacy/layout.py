"""How the weights of the original formats are named and joined on disk, and which native weights they
become."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

from mft.model.safetensors_header import Shape, Stored
from mft.model.weights import is_former_buffer, refuse_misfits

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedConfig, PreTrainedModel

QKV = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")


@dataclass(frozen=True)
class Layout:
    """The names of one original format."""

    names: Mapping[str, str] = field(default_factory=dict)
    """Part of an original name → what it is natively; replaced in this order."""

    joint: str = ""
    """Name of the projection whose rows are queries, keys and values; "" where they are apart."""

    per_head: bool = False
    """Whether the rows of the joint projection are [heads, 3, width]; else all queries come first."""

    def native_names(self, name: str) -> list[str]:
        """Returns the names of the native weights that a stored one becomes: three for a joint projection."""
        for original, native in self.names.items():
            name = name.replace(original, native)
        if self.joint and f".{self.joint}." in name:
            return [name.replace(self.joint, part) for part in QKV]
        return [name]

    def split(self, weight: torch.Tensor, config: PreTrainedConfig) -> list[torch.Tensor]:
        """Returns queries, keys and values of a joint weight [rows, ...]; config: the native one, with its
        sizes."""
        heads, groups = config.num_attention_heads, config.num_key_value_heads
        width = getattr(config, "head_dim", None) or config.hidden_size // heads
        if self.per_head:
            parts = [p.flatten(0, 1) for p in weight.unflatten(0, (heads, 3, width)).unbind(1)]
        else:
            parts = list(weight.split([heads * width, groups * width, groups * width]))
        return [part.contiguous() for part in parts]


CHATGLM = Layout(
    {
        "transformer.embedding.word_embeddings.": "model.embed_tokens.",
        "transformer.output_layer.": "lm_head.",
        "transformer.encoder.final_layernorm.": "model.norm.",
        "transformer.encoder.layers.": "model.layers.",
        "self_attention.dense.": "self_attn.o_proj.",
        "mlp.dense_h_to_4h.": "mlp.gate_up_proj.",
        "mlp.dense_4h_to_h.": "mlp.down_proj.",
    },
    "self_attention.query_key_value",
)
CHATGLM_PER_HEAD = replace(CHATGLM, per_head=True)
"""ChatGLM without multi-query attention."""

QWEN = Layout(
    {
        "transformer.wte.": "model.embed_tokens.",
        "transformer.ln_f.": "model.norm.",
        "transformer.h.": "model.layers.",
        ".ln_1.": ".input_layernorm.",
        ".ln_2.": ".post_attention_layernorm.",
        "attn.c_proj.": "self_attn.o_proj.",
        "mlp.w1.": "mlp.up_proj.",
        "mlp.w2.": "mlp.gate_proj.",
        "mlp.c_proj.": "mlp.down_proj.",
    },
    "attn.c_attn",
)
BAICHUAN = Layout(joint="self_attn.W_pack")
AQUILA = Layout()
"""Aquila's names are llama's."""


def check_weights(who: str, layout: Layout, stored: Stored, model: PreTrainedModel) -> None:
    """Raises UserError unless the weights of an original checkpoint are exactly those that its config.json
    describes.

    who: begins the sentence; stored: name → (file, header); model: the native model, on the meta device.
    """
    expected: dict[str, Shape] = {name: tuple(weight.shape) for name, weight in model.state_dict().items()}
    missing = set(expected) - ({"lm_head.weight"} if model.config.tie_word_embeddings else set())
    unknown: list[str] = []
    wrong: list[tuple[str, str]] = []
    for name, (file, tensor) in stored.items():
        parts = [part for part in layout.native_names(name) if part in expected]
        missing -= set(parts)
        if parts:
            # a joint weight has the rows of its parts, one after the other
            shape = (sum(expected[part][0] for part in parts), *expected[parts[0]][1:])
            if tensor.shape != shape:
                clause = f"{name} in {file} is {list(tensor.shape)}, by config.json it is {list(shape)}"
                wrong.append((parts[0], clause))
        elif not is_former_buffer(name, tensor.shape):
            unknown.append(name)
    refuse_misfits(who, model, stored, wrong, sorted(missing), unknown)
