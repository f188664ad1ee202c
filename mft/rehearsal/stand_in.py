"""A tiny model that stands in for a large one: the same class, its config with few and narrow layers."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mft.errors import UserError
from mft.model.attention_kernel import FLASH, Attention
from mft.model.causal_lm import CHECKPOINTING_ABOVE, CausalLM
from mft.model.introspect import parameter_count
from mft.model.meta_model import EXPERTS, skeleton

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

LARGEST = 250_000_000
"""Weights of a stand-in at most; most of them are its embedding, whose rows stay as many as they are."""

LAYERS = 2
WIDTHS = (
    *("intermediate_size", "ffn_dim", "ffn_hidden_size", "n_inner"),
    *("moe_intermediate_size", "shared_expert_intermediate_size"),
)
"""Names of widths inside a layer in configs."""

WIDTH = 128
"""Of those at most; a multiple of 64, as the blocks of 4-bit weights are."""

FEW = {"num_experts_per_tok": 2, "moe_topk": 2, "n_group": 1, "topk_group": 1, "first_k_dense_replace": 1}
FEW |= dict.fromkeys(EXPERTS, 4)
"""Names of counts in the configs of mixtures of experts → the largest in a stand-in."""


def stand_in(family: CausalLM, folder: Path, rank: int, count: int | None) -> tuple[CausalLM, str]:
    """Makes a stand-in with random weights in a folder; returns its family, and what it is in words.

    rank: of adapters, which a matrix has to have room for; count: weights of the real model. Raises
    UserError, saying why, where no small model of this architecture can be made.
    """
    import torch
    from safetensors.torch import save_model
    from transformers import AutoModelForCausalLM

    if family.trust_remote_code:
        raise UserError("code that comes with a checkpoint is not run for it")
    reason = ""
    for config in candidates(family.config(), rank):
        try:
            size = parameter_count(skeleton(config))
            if size > LARGEST:
                reason = reason or f"it would still have {size / 1e6:,.0f} M weights"
                continue
            torch.manual_seed(0)
            model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
            with torch.no_grad():
                logits = model(input_ids=torch.arange(8)[None] % config.get_text_config().vocab_size).logits
            assert torch.isfinite(logits).all(), "its logits are not finite"
        except Exception as error:  # each architecture has its own kind of protest
            text = " ".join(str(error).split())[:200]
            reason = reason or f"{type(error).__name__}: {text}"
            continue
        # Not the model's save_pretrained, whose first call imports for seconds.
        model.config.save_pretrained(str(folder))
        save_model(model, str(folder / "model.safetensors"), metadata={"format": "pt"})
        if family.new_tokens():
            family.read_tokenizer().save_pretrained(str(folder))
        text_config = config.get_text_config()
        layers, width = text_config.num_hidden_layers, text_config.hidden_size
        words = f"{type(model).__name__} with {layers} layers of width {width}, {size / 1e6:.3g} M weights"
        return _family(family, folder, count), words
    raise UserError(reason or "it has no config to make it from")


def candidates(config: PreTrainedConfig, rank: int) -> Iterator[PreTrainedConfig]:
    """Yields smaller configs, the smallest first: with fewer layers of 2 heads, of 4, as wide as they are."""
    for heads in (2, 4, None):
        small = copy.deepcopy(config)
        if hasattr(small, "quantization_config"):
            del small.quantization_config
        text = small.get_text_config()
        _fewer_layers(text)
        for name, most in FEW.items():
            _at_most(text, name, most)
        if heads:
            _narrower(text, heads, rank)
        yield small


def _at_most(config: Any, name: str, most: int) -> None:
    value = getattr(config, name, None)
    if isinstance(value, int) and not isinstance(value, bool) and value > most:
        setattr(config, name, most)


def _fewer_layers(config: Any) -> None:
    """Keeps a layer of each kind, and at least LAYERS; lists with an entry for each layer follow."""
    count = config.num_hidden_layers
    kinds = getattr(config, "layer_types", None) or getattr(config, "layers_block_type", None)
    first_of_kind = {kind: place for place, kind in reversed([*enumerate(kinds or ())])}
    kept = sorted(set(first_of_kind.values()))
    others = [place for place in range(count) if place not in kept]
    kept = sorted([*kept, *others[: max(0, LAYERS - len(kept))]])
    lists = [name for name, value in vars(config).items() if isinstance(value, list) and len(value) == count]
    for name in lists if kinds else ():
        setattr(config, name, [getattr(config, name)[place] for place in kept])
    config.num_hidden_layers = len(kept)


def _narrower(config: Any, few: int, rank: int) -> None:
    """Fewer heads of the same width, since positions and norms are made for it; narrower layers inside."""
    heads, hidden = getattr(config, "num_attention_heads", None), config.hidden_size
    for name in WIDTHS:
        _at_most(config, name, max(WIDTH, rank))
    if not isinstance(heads, int) or hidden % heads:
        return
    groups = getattr(config, "num_key_value_heads", None) or heads
    if getattr(config, "head_dim", None) not in (None, hidden // heads):  # heads and width are independent
        width = min(hidden, -(-max(WIDTH, rank) // 64) * 64)
    else:
        while few < heads and ((few * hidden // heads) % 64 or few * hidden // heads < rank):
            few *= 2
        width = few * hidden // heads
    if few >= heads:
        return
    config.hidden_size, config.num_attention_heads = width, few
    if getattr(config, "num_key_value_heads", None):
        config.num_key_value_heads = few if groups == heads else 1
    if getattr(config, "word_embed_proj_dim", None) == hidden:
        config.word_embed_proj_dim = config.hidden_size


def _family(family: CausalLM, folder: Path, count: int | None) -> CausalLM:
    """Returns the family of a stand-in: the real one's settings on another folder."""
    changes: dict[str, Any] = {"path": str(folder), "revision": None}
    if str(family.gradient_checkpointing).lower() == "auto":
        changes["gradient_checkpointing"] = (count or 0) > CHECKPOINTING_ABOVE
    if family.attention == FLASH:
        changes["attention"] = Attention.sdpa
    if not type(family).__module__.startswith("mft."):  # of a plug-in, whose own methods are to be tried
        return dataclasses.replace(family, **changes)
    # ours differ in how they read a checkpoint, and the stand-in is in the plain format
    common = {field.name: getattr(family, field.name) for field in dataclasses.fields(CausalLM)}
    return CausalLM(**(common | changes))
