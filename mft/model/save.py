"""Model folders as they are written: plain safetensors that transformers loads by itself, also its generation
before.

Transformers 5 renamed keys without which transformers 4 computes something else and says nothing (positions
of the rotary embedding) or refuses the folder (the class of a tokenizer); both names are written.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mft.errors import UserError, writable
from mft.files.checksums import seal
from mft.model.special_tokens import as_ids

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedTokenizerBase

CARD = """\
---
library_name: transformers
tags: [mft]
---

# A decoder with ALiBi

This model has RMSNorm, SwiGLU and linear attention biases (ALiBi) in place of rotary positions, as Baichuan-13B has.
transformers has no class for it, so `AutoModelForCausalLM.from_pretrained` says that it does not recognise the type
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
    model: Any,
    folder: Path,
    state_dict: dict[str, torch.Tensor] | None = None,
    dtype: torch.dtype | None = None,
) -> None:
    """Writes config and weights of a transformers model, the rows of a NormHead at length 1.

    state_dict: its weights, where they were gathered from elsewhere; dtype: of the weights on disk (default:
    as they are).
    """
    from mft.model.legacy.native import plain_rows

    state_dict = plain_rows(model, model.state_dict() if state_dict is None else state_dict)
    if dtype is not None:
        state_dict = {k: v.to(dtype) if v.is_floating_point() else v for k, v in state_dict.items()}
    model.save_pretrained(str(folder), state_dict=state_dict)
    finish_config(folder, {} if dtype is None else {"dtype": str(dtype).removeprefix("torch.")})


def finish_config(folder: Path, changes: Mapping[str, Any]) -> None:
    """Puts changes into a config.json that transformers wrote, and the names of its generation before; of a
    class of ours a README says what it needs."""
    from mft.model.legacy.native import NORM_HEAD, AlibiConfig

    def finished(values: dict[str, Any]) -> dict[str, Any]:
        values = {key: value for key, value in values.items() if key != NORM_HEAD} | dict(changes)
        return values | former_names(values)

    edit_json(folder / "config.json", finished)
    if (
        json.loads((folder / "config.json").read_text(encoding="utf-8"))["model_type"]
        == AlibiConfig.model_type
    ):
        (folder / "README.md").write_text(CARD, encoding="utf-8")


def former_names(config: dict[str, Any]) -> dict[str, Any]:
    """Returns what transformers 4 calls values of a config.json: the dtype, the experts of qwen3_moe, and the
    rotary embedding, where it is one and the same in all layers."""
    former: dict[str, Any] = {"torch_dtype": config["dtype"]} if isinstance(config.get("dtype"), str) else {}
    if config["model_type"] == "qwen3_moe":
        former["num_experts"] = config["num_local_experts"]
    rope = config.get("rope_parameters") or {}
    if "rope_theta" not in rope:
        return former
    base, part = (
        ("rotary_emb_base", "rotary_pct") if config["model_type"] == "gpt_neox" else ("rope_theta", PART)
    )
    former[base] = rope["rope_theta"]
    if PART in rope:
        former[part] = rope[PART]
    if rope.get("rope_type", "default") != "default":
        former["rope_scaling"] = rope
    return former


PART = "partial_rotary_factor"


def write_tokenizer(tokenizer: PreTrainedTokenizerBase, folder: Path) -> None:
    """Writes a tokenizer with its chat template, and its EOS into the configs of a model that is there
    already."""
    tokenizer.save_pretrained(str(folder))
    _write_ends(tokenizer, folder)
    edit_json(folder / "tokenizer_config.json", _former_tokenizer)


def _write_ends(tokenizer: PreTrainedTokenizerBase, folder: Path) -> None:
    """Puts the tokenizer's EOS first among those by which the model saved in a folder stops, and its pad
    token there where none is named; nothing in a folder without a model.

    generate() of transformers, and vLLM, read generation_config.json, not the tokenizer: with the base's
    alone an answer would run on over the end that was trained. The pad token stays out of config.json: there
    it is the row of the embedding that is not trained.
    """
    end, pad = tokenizer.eos_token_id, tokenizer.pad_token_id

    def stopped(values: dict[str, Any]) -> dict[str, Any]:
        ids = [end, *(i for i in as_ids(values.get("eos_token_id")) if i != end)]
        return values | {"eos_token_id": ids if len(ids) > 1 else end}

    if (folder / "config.json").is_file():
        edit_json(folder / "config.json", stopped)
    if (folder / "generation_config.json").is_file():
        edit_json(
            folder / "generation_config.json",
            lambda values: (
                stopped(values) | ({"pad_token_id": pad} if values.get("pad_token_id") is None else {})
            ),
        )


def _former_tokenizer(values: dict[str, Any]) -> dict[str, Any]:
    values = dict(values)
    if values.get("tokenizer_class") == "TokenizersBackend":
        values["tokenizer_class"] = "PreTrainedTokenizerFast"
    if isinstance(extra := values.get("extra_special_tokens"), list):
        values["additional_special_tokens"] = extra
        del values["extra_special_tokens"]
    return values


def edit_json(file: Path, change: Callable[[dict[str, Any]], dict[str, Any]]) -> None:
    """Rewrites a JSON file with what `change` makes of its values."""
    values = change(json.loads(file.read_text(encoding="utf-8")))
    file.write_text(json.dumps(values, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def new_folder(out: Path) -> Path:
    """Returns an empty folder beside `out` to write into, to be renamed to it when it is whole.

    Raises UserError as `check_out`.
    """
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
