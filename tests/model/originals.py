"""The original formats, written out by hand: checkpoints of any size, and what their code computes of them.

A reference of its own: plain tensors, no class of transformers, one sample after the other.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file

Values = dict[str, Any]
Weights = dict[str, torch.Tensor]
FIXTURES = Path(__file__).parents[1] / "fixtures" / "legacy_models"


def write(folder: Path, name: str, seed: int = 0, dtype: torch.dtype = torch.float32, **values: Any) -> Path:
    """Writes a random checkpoint in the format of the fixture of that name, with other values in its
    config.json; None takes one out."""
    config = json.loads((FIXTURES / name / "config.json").read_text()) | values
    config = {key: value for key, value in config.items() if not (key in values and value is None)}
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    torch.manual_seed(seed)
    weights = {key: torch.randn(shape).mul(0.1).to(dtype) for key, shape in shapes(config).items()}
    for key in weights:
        if "norm" in key or "ln_" in key:
            weights[key] = weights[key] + 1
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def sharded(folder: Path) -> None:
    """Cuts model.safetensors in two with an index, as large releases come; a layer's weights lie in both."""
    weights = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    where = {key: f"model-0000{1 + i % 2}-of-00002.safetensors" for i, key in enumerate(weights)}
    for file in set(where.values()):
        save_file(
            {k: t for k, t in weights.items() if where[k] == file}, folder / file, metadata={"format": "pt"}
        )
    index = {"metadata": {"total_size": 0}, "weight_map": where}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def sizes(c: Values) -> tuple[int, int, int, int, int, int]:
    """Returns (layers, width, heads, heads of keys and values, head width, vocabulary)."""
    if c["model_type"] == "chatglm":
        heads = c["num_attention_heads"]
        groups = c["multi_query_group_num"] if c["multi_query_attention"] else heads
        return c["num_layers"], c["hidden_size"], heads, groups, c["kv_channels"], c["padded_vocab_size"]
    heads, width = c["num_attention_heads"], c["hidden_size"]
    groups = c.get("num_key_value_heads") or heads
    return c["num_hidden_layers"], width, heads, groups, width // heads, c["vocab_size"]


def shapes(c: Values) -> dict[str, tuple[int, ...]]:
    """Returns the shape of every weight under its original name."""
    layers, width, heads, groups, hd, vocab = sizes(c)
    rows = (heads + 2 * groups) * hd
    found: dict[str, tuple[int, ...]] = {}
    if c["model_type"] == "chatglm":
        inner = c["ffn_hidden_size"]
        found["transformer.embedding.word_embeddings.weight"] = (vocab, width)
        for i in range(layers):
            at = f"transformer.encoder.layers.{i}."
            found |= {
                at + "input_layernorm.weight": (width,),
                at + "post_attention_layernorm.weight": (width,),
            }
            found[at + "self_attention.query_key_value.weight"] = (rows, width)
            if c["add_qkv_bias"]:
                found[at + "self_attention.query_key_value.bias"] = (rows,)
            found[at + "self_attention.dense.weight"] = (width, heads * hd)
            found[at + "mlp.dense_h_to_4h.weight"] = (2 * inner, width)
            found[at + "mlp.dense_4h_to_h.weight"] = (width, inner)
        found |= {"transformer.encoder.final_layernorm.weight": (width,)}
        return found | {"transformer.output_layer.weight": (vocab, width)}
    inner = c["intermediate_size"]
    if c["model_type"] == "qwen":
        found["transformer.wte.weight"] = (vocab, width)
        for i in range(layers):
            at = f"transformer.h.{i}."
            found |= {at + "ln_1.weight": (width,), at + "ln_2.weight": (width,)}
            found |= {at + "attn.c_attn.weight": (rows, width), at + "attn.c_attn.bias": (rows,)}
            found |= {
                at + "attn.c_proj.weight": (width, width),
                at + "mlp.c_proj.weight": (width, inner // 2),
            }
            found |= {at + "mlp.w1.weight": (inner // 2, width), at + "mlp.w2.weight": (inner // 2, width)}
        return found | {"transformer.ln_f.weight": (width,), "lm_head.weight": (vocab, width)}
    found["model.embed_tokens.weight"] = (vocab, width)
    for i in range(layers):
        at = f"model.layers.{i}."
        found |= {at + "input_layernorm.weight": (width,), at + "post_attention_layernorm.weight": (width,)}
        if c["model_type"] == "baichuan":
            found[at + "self_attn.W_pack.weight"] = (rows, width)
        else:
            for part, n in (("q", heads), ("k", groups), ("v", groups)):
                found[at + f"self_attn.{part}_proj.weight"] = (n * hd, width)
        found |= {
            at + "self_attn.o_proj.weight": (width, heads * hd),
            at + "mlp.down_proj.weight": (width, inner),
        }
        found |= {at + "mlp.gate_proj.weight": (inner, width), at + "mlp.up_proj.weight": (inner, width)}
    return found | {"model.norm.weight": (width,), "lm_head.weight": (vocab, width)}


def logits(
    c: Values, w: Weights, ids_T: list[int], rope_ratio: str = "base", norm_head: bool = False
) -> torch.Tensor:
    """Returns the logits [T, V] that the original code has for one sample."""
    kind = c["model_type"]
    layers, _, heads, groups, hd, _ = sizes(c)
    glm, qwen = kind == "chatglm", kind == "qwen"
    eps = c["layernorm_epsilon"] if glm else c["layer_norm_epsilon"] if qwen else c["rms_norm_eps"]

    def norm(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + eps) * weight

    stem = "transformer.encoder." if glm else "transformer." if qwen else "model."
    embedding = {"chatglm": "transformer.embedding.word_embeddings", "qwen": "transformer.wte"}
    x = w[embedding.get(kind, "model.embed_tokens") + ".weight"][torch.tensor(ids_T)]
    T = len(ids_T)
    future = torch.ones(T, T, dtype=torch.bool).triu(1)
    for i in range(layers):
        at = f"{stem}{'h' if qwen else 'layers'}.{i}."
        h = norm(x, w[at + ("ln_1" if qwen else "input_layernorm") + ".weight"])
        q, k, v = (part.view(T, -1, hd).transpose(0, 1) for part in _qkv(c, w, at, h))
        if kind == "baichuan" and "max_position_embeddings" not in c:
            distance = torch.arange(T)[None] - torch.arange(T)[:, None]
            bias = torch.tensor(slopes(heads))[:, None, None] * distance
        else:
            q, k, bias = _turned(c, q, rope_ratio), _turned(c, k, rope_ratio), torch.zeros(())
        k, v = (t.repeat_interleave(heads // groups, 0) for t in (k, v))
        scores = (q @ k.mT / hd**0.5 + bias).masked_fill(future, float("-inf"))
        mixed = (scores.softmax(-1) @ v).transpose(0, 1).reshape(T, -1)
        out = "self_attention.dense" if glm else "attn.c_proj" if qwen else "self_attn.o_proj"
        x = x + mixed @ w[at + out + ".weight"].T
        h = norm(x, w[at + ("ln_2" if qwen else "post_attention_layernorm") + ".weight"])
        if glm:
            gate, up = (h @ w[at + "mlp.dense_h_to_4h.weight"].T).chunk(2, -1)
        else:
            gate = h @ w[at + ("mlp.w2" if qwen else "mlp.gate_proj") + ".weight"].T
            up = h @ w[at + ("mlp.w1" if qwen else "mlp.up_proj") + ".weight"].T
        down = "mlp.dense_4h_to_h" if glm else "mlp.c_proj" if qwen else "mlp.down_proj"
        x = x + (F.silu(gate) * up) @ w[at + down + ".weight"].T
    x = norm(x, w[stem + ("final_layernorm" if glm else "ln_f" if qwen else "norm") + ".weight"])
    head = w["transformer.output_layer.weight" if glm else "lm_head.weight"]
    return x @ (head / head.norm(dim=-1, keepdim=True) if norm_head else head).T


def _qkv(c: Values, w: Weights, at: str, h: torch.Tensor) -> list[torch.Tensor]:
    _, _, heads, groups, hd, _ = sizes(c)
    if c["model_type"] == "aquila":
        return [h @ w[at + f"self_attn.{part}_proj.weight"].T for part in "qkv"]
    name = {
        "chatglm": "self_attention.query_key_value",
        "qwen": "attn.c_attn",
        "baichuan": "self_attn.W_pack",
    }
    joint = F.linear(
        h, w[at + name[c["model_type"]] + ".weight"], w.get(at + name[c["model_type"]] + ".bias")
    )
    if c["model_type"] == "chatglm" and not c["multi_query_attention"]:
        return [part.reshape(len(h), -1) for part in joint.view(len(h), heads, 3, hd).unbind(2)]
    return list(joint.split([heads * hd, groups * hd, groups * hd], -1))


def _turned(c: Values, x: torch.Tensor, rope_ratio: str) -> torch.Tensor:
    """Returns [heads, T, width] turned by rotary positions."""
    _, T, hd = x.shape
    position = torch.arange(T, dtype=torch.float32)
    base = float(c.get("rotary_emb_base") or c.get("rope_theta") or 10000)
    if c["model_type"] == "chatglm":  # pairs of neighbours, in the first half of a head
        ratio, half = c.get("rope_ratio") or 1, hd // 2
        position, base = (position / ratio, base) if rope_ratio == "positions" else (position, base * ratio)
        angle = position[:, None] * base ** -(torch.arange(0, half, 2) / half)
        even, odd = x[..., 0:half:2], x[..., 1:half:2]
        cos, sin = angle.cos(), angle.sin()
        turned = torch.stack([even * cos - odd * sin, odd * cos + even * sin], -1).flatten(-2)
        return torch.cat([turned, x[..., half:]], -1)
    if scaling := c.get("rope_scaling"):
        position = position / scaling["factor"]
    angle = position[:, None] * base ** -(torch.arange(0, hd, 2) / hd)
    first, second = x.chunk(2, -1)
    cos, sin = angle.cos(), angle.sin()
    return torch.cat([first * cos - second * sin, second * cos + first * sin], -1)


def slopes(heads: int) -> list[float]:
    """Returns ALiBi's slopes: a geometric row for a power of two; else that of the power below, and every
    other one of the power above."""
    if heads & (heads - 1) == 0:
        return [2 ** (-8 * (i + 1) / heads) for i in range(heads)]
    below = 2 ** (heads.bit_length() - 1)
    return slopes(below) + slopes(2 * below)[0::2][: heads - below]
