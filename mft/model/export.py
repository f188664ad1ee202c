"""Writes trained or converted models as a folder that transformers and peft load."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mft.model.causal_lm import CausalLM
from mft.model.legacy.original import Original
from mft.model.origin import CONVERTED, Origin, write_note
from mft.model.save import edit_json, new_folder, put, write_model, write_tokenizer

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedTokenizerBase


def save_final(
    module: Any,
    tokenizer: PreTrainedTokenizerBase,
    folder: Path,
    state_dict: dict[str, torch.Tensor] | None = None,
) -> None:
    """Writes an adapter folder (peft) or a model folder (transformers), safetensors, with the tokenizer, its
    chat template and mft.json.

    module: a TokenLoss; state_dict: its own, as gathered by the engine from all ranks where it is sharded.
    Rank 0 calls it: inside a process group transformers writes nothing on the others, without an error.
    """
    from mft.model.introspect import base_of, with_ties
    from mft.model.legacy.native import plain_rows
    from mft.model.peft.init import relative_to_base

    folder.mkdir(parents=True, exist_ok=True)
    model, base = module.model, base_of(module.model)
    if state_dict is not None:
        state_dict = {name.removeprefix("model."): tensor for name, tensor in state_dict.items()}
    if base is model:
        write_model(model, folder, state_dict)
    else:
        weights = plain_rows(base, model.state_dict() if state_dict is None else with_ties(model, state_dict))
        weights, changed = relative_to_base(model, weights)
        # By default peft would ask the hub for the base's config, to see whether its vocabulary was resized.
        model.save_pretrained(str(folder), state_dict=weights, save_embedding_layers=False)
        edit_json(folder / "adapter_config.json", lambda values: _in_order(values) | changed)
    write_tokenizer(tokenizer, folder)
    write_note(folder, "full" if base is model else "adapter", Origin.of(base, module.family))


def _in_order(values: dict[str, Any]) -> dict[str, Any]:
    """Returns an adapter's config with its modules in order: peft writes a set, in another order every time."""
    modules = values.get("target_modules")
    return values | {"target_modules": sorted(modules)} if isinstance(modules, list) else values


def save_native(family: CausalLM, out: Path) -> None:
    """Writes a checkpoint in its original format, or a quantised one dequantised, as a native folder, its
    weights in the dtype they have, or that the config of a quantised one names (bfloat16 if none).

    An adapter trained on the one works on the other. Raises UserError when `out` exists already.
    """
    import torch

    part = new_folder(out)
    if isinstance(family, Original):
        family.convert(part)
        dtype = json.loads((part / "config.json").read_text(encoding="utf-8"))["dtype"]
        origin = Origin(family.location(), family.revision, family.fingerprint(), dtype)
    else:
        config: Any = family.config()
        model = family.model(config.dtype or torch.bfloat16, dequantise=True)
        write_model(model, part)
        origin = Origin.of(model, family)
    write_tokenizer(family.tokenizer(), part)
    write_note(part, CONVERTED, origin)
    put(part, out)
