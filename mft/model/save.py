"""Writes model folders: plain safetensors that transformers loads without mft, version 4 included.

Transformers 5 renamed keys without which transformers 4 computes something else and says nothing (positions
of the rotary embedding) or refuses the folder (the class of a tokenizer); both names are written.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mft.errors import UserError, writable
from mft.files.checksums import seal
from mft.model.special_tokens import as_ids

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

Values = dict[str, Any]
"""Of a JSON file."""

LOADED_BY = ("is_local", "local_files_only")
"""What transformers keeps with a tokenizer's own settings of where it came from: a folder, without the hub."""

CARD = """\
---
library_name: transformers
tags: [mft]
---

# A decoder with ALiBi

This model has RMSNorm, SwiGLU and linear attention biases (ALiBi) in place of rotary positions, as \
Baichuan-13B has.
transformers has no class for it, so `AutoModelForCausalLM.from_pretrained` says that it does not \
recognise the type
`mft_alibi`. With the package `mft` installed, which trained it, one import more makes it known:

```python
import mft.model.native
from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained(".")
tokenizer = AutoTokenizer.from_pretrained(".")
```

The weights are named as in a llama; adapters load onto it with peft.
"""
"""README.md of a folder that needs a class of ours."""


def write_model(
    model: PreTrainedModel, folder: Path, state_dict: dict[str, torch.Tensor] | None = None
) -> None:
    """Writes config and weights of a transformers model, the rows of a NormHead at length 1.

    state_dict: its weights, where they were gathered from elsewhere.
    """
    from mft.model.legacy.native import plain_rows

    state_dict = plain_rows(model, model.state_dict() if state_dict is None else state_dict)
    model.save_pretrained(str(folder), state_dict=state_dict)
    finish_config(folder)


def finish_config(folder: Path, changes: Values | None = None) -> None:
    """Puts changes into a config.json that transformers wrote, and the names of its generation before; of a
    class of ours a README says what it needs."""
    from mft.model.legacy.native import NORM_HEAD, AlibiConfig

    def finished(values: Values) -> Values:
        values = {key: value for key, value in values.items() if key != NORM_HEAD} | (changes or {})
        return values | former_names(values)

    if edit_json(folder / "config.json", finished)["model_type"] == AlibiConfig.model_type:
        (folder / "README.md").write_text(CARD, encoding="utf-8")


def former_names(config: Values) -> Values:
    """Returns what transformers 4 calls values of a config.json: the dtype, the experts of qwen3_moe, and the
    rotary embedding, where it is one and the same in all layers."""
    former: Values = {"torch_dtype": config["dtype"]} if isinstance(config.get("dtype"), str) else {}
    if config["model_type"] == "qwen3_moe":
        former["num_experts"] = config["num_local_experts"]
    rope = config.get("rope_parameters") or {}
    if "rope_theta" not in rope:  # none, or one for each kind of layer, which transformers 4 cannot say
        return former
    names = {"rope_theta": "rope_theta", "partial_rotary_factor": "partial_rotary_factor"}
    if config["model_type"] == "gpt_neox":
        names = {"rope_theta": "rotary_emb_base", "partial_rotary_factor": "rotary_pct"}
    former |= {old: rope[name] for name, old in names.items() if name in rope}
    if rope.get("rope_type", "default") != "default":
        former["rope_scaling"] = rope
    return former


def write_tokenizer_files(tokenizer: PreTrainedTokenizerBase, folder: Path) -> None:
    """Writes a tokenizer as `save_pretrained` does, without what transformers notes about how it was loaded
    (LOADED_BY), which would make two folders of the same tokenizer differ."""
    for name in LOADED_BY:
        tokenizer.init_kwargs.pop(name, None)
    tokenizer.save_pretrained(str(folder))


def write_tokenizer(tokenizer: PreTrainedTokenizerBase, folder: Path) -> None:
    """Writes a tokenizer with its chat template, and its EOS into the configs of a model beside it."""
    write_tokenizer_files(tokenizer, folder)
    eos, pad = tokenizer.eos_token_id, tokenizer.pad_token_id

    # generate() of transformers, and vLLM, stop by generation_config.json, not by the tokenizer: with the
    # base's EOS alone an answer would run on over the end that was trained.
    def with_eos(values: Values) -> Values:
        ids = [eos, *(i for i in as_ids(values.get("eos_token_id")) if i != eos)]
        return values | {"eos_token_id": ids if len(ids) > 1 else eos}

    # The pad token stays out of config.json: there it is the row of the embedding that is not trained.
    def with_pad(values: Values) -> Values:
        return with_eos(values) | ({"pad_token_id": pad} if values.get("pad_token_id") is None else {})

    for name, change in (("config.json", with_eos), ("generation_config.json", with_pad)):
        if (folder / name).is_file():
            edit_json(folder / name, change)
    edit_json(folder / "tokenizer_config.json", _former_tokenizer)


def _former_tokenizer(values: Values) -> Values:
    if values.get("tokenizer_class") == "TokenizersBackend":
        values["tokenizer_class"] = "PreTrainedTokenizerFast"
    if isinstance(values.get("extra_special_tokens"), list):
        values["additional_special_tokens"] = values.pop("extra_special_tokens")
    return values


def edit_json(file: Path, change: Callable[[Values], Values]) -> Values:
    """Rewrites a JSON file with what `change` makes of its values, and returns that."""
    values = change(json.loads(file.read_text(encoding="utf-8")))
    file.write_text(json.dumps(values, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    return values


def new_folder(out: Path) -> Path:
    """Returns an empty folder beside `out` to write into, which `put` renames; UserError as `check_out`."""
    check_out(out)
    part = out.with_name(out.name + ".part")
    shutil.rmtree(part, ignore_errors=True)
    part.mkdir(parents=True)
    return part


def check_out(out: Path) -> None:
    """Raises UserError when there is something at `out` that would be overwritten, or nothing can be written
    there."""
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UserError(f"out={out} exists already; give a folder that does not")
    writable(out.parent, f"out={out}")


def put(part: Path, out: Path) -> None:
    """Gives the folder that `new_folder` returned its name, with the checksums of what is in it."""
    seal(part)
    if out.exists():
        out.rmdir()
    part.rename(out)
