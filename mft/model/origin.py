"""`mft.json` of a trained folder: which base model it was made from, and how that was held while training."""

from __future__ import annotations

import json
import shlex
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mft.errors import UserError
from mft.model.causal_lm import CausalLM
from mft.model.model_folder import ORIGINAL_FORMATS, read_config
from mft.model.quantised_checkpoint import refuse_quantised

if TYPE_CHECKING:
    import torch
    from transformers import BitsAndBytesConfig, PreTrainedModel

NOTE = "mft.json"
CONVERTED = "converted"
"""Kind of a native folder that stands for another checkpoint: its origin is that checkpoint, not what it was
trained from."""

FORMER_CLASSES = {"ChatGLM": "chatglm3", "Qwen": "qwen", "Baichuan": "baichuan", "Aquila": "aquila2"}
"""Class of a family in notes of earlier versions, which read original formats on the fly → its choice."""


@dataclass(frozen=True)
class Origin:
    """What a trained folder was made from."""

    path: str
    """Folder of the base model, or its hub name; the native folder of one in an original format."""

    revision: str | None = None
    """Branch, tag or commit of a hub name."""

    fingerprint: str = ""
    """Of the checkpoint that the user named (CausalLM.fingerprint), also where it was converted; "" = not
    known."""

    dtype: str = "float32"
    """Of the base's unquantised weights while training, e.g. bfloat16."""

    quantization: dict[str, Any] | None = None
    """Arguments of BitsAndBytesConfig, None for an unquantised base."""

    tokens: dict[str, Any] | None = None
    """What was added to its vocabulary (CausalLM.new_tokens), None for nothing."""

    converted_from: str = ""
    """Words for `mft convert` that name the checkpoint in its original format (CausalLM.conversion), "" for
    others."""

    @classmethod
    def of(cls, base: PreTrainedModel, family: CausalLM) -> Origin:
        """Returns the origin of what is trained from `base`, a loaded transformers model of that family."""
        # The first parameter belongs to the embedding, which is neither quantised nor an adapter's.
        dtype = str(next(base.parameters()).dtype).removeprefix("torch.")
        bits = quantization_settings(getattr(base.config, "quantization_config", None))
        source, fingerprint = family.source(), family.fingerprint()
        added, words = family.new_tokens(), family.conversion()
        return cls(source, family.revision, fingerprint, dtype, bits, added, words)

    @classmethod
    def read(cls, folder: Path, base: str | None = None) -> Origin:
        """Returns the origin of a trained folder; `base` replaces the base's path where it has moved.

        An adapter made elsewhere has no mft.json: its base is taken from adapter_config.json, unquantised.
        """
        config = folder / "adapter_config.json"
        if note := read_note(folder):
            values = note["origin"]
            if former := values.get("original"):  # earlier versions wrote the options of the family itself
                words = {"": FORMER_CLASSES.get(former.pop("class"), "auto")}
                words |= {".path": values["path"], ".revision": values["revision"]}
                words |= {f".{name}": value for name, value in former.items()}
                values["converted_from"] = convert_words(words)
            origin = cls(**{k: v for k, v in values.items() if k in cls.__dataclass_fields__})
        elif config.exists():
            values = json.loads(config.read_text(encoding="utf-8"))
            origin = cls(values.get("base_model_name_or_path") or "", values.get("revision"))
        else:
            raise UserError(f"{folder} has no {NOTE} and no adapter_config.json: its base is unknown")
        return replace(origin, path=base) if base else origin

    def family(self, trust_remote_code: bool = False) -> CausalLM:
        """Returns the base model; UserError when it is missing or is not the one that was trained on."""
        tokens = self.tokens or {}
        family = CausalLM(self.path, self.revision, trust_remote_code=trust_remote_code, **tokens)
        folder = Path(family.location())
        if self.converted_from and read_config(folder).get("model_type") in (None, *ORIGINAL_FORMATS):
            raise UserError(
                f"the base model of this adapter, {self.path}, is not a native folder, or is gone from the "
                f"cache: write one with `mft convert {self.converted_from} --out FOLDER`; give --base FOLDER"
            )
        # Any quantisation of its own is fine here (weights.bits): the adapter was trained beside it.
        try:
            family.check()
            weights = family.weight_format()
            refuse_quantised(self.path, weights, weights.bits)
        except UserError as error:
            message = f"the base model of this adapter cannot be used: {error}; give another with --base"
            raise UserError(message) from error
        # A converted folder is as good as the checkpoint that it was made of.
        note, fingerprint = read_note(folder), family.fingerprint()
        source = note["origin"]["fingerprint"] if note.get("kind") == CONVERTED else ""
        if self.fingerprint and self.fingerprint not in (source, fingerprint):
            raise UserError(
                f"the base model {self.path} is not the one the adapter was trained on: its fingerprint is "
                f"{source or fingerprint}, not {self.fingerprint}; give the right one with --base"
            )
        return family

    def torch_dtype(self) -> torch.dtype:
        import torch

        return getattr(torch, self.dtype)

    def load(self, trust_remote_code: bool = False) -> PreTrainedModel:
        """Returns the base model in the dtype and quantisation it was trained in.

        Whether its own code may run is for the person at hand to say, never for the folder of the adapter.
        """
        from transformers import BitsAndBytesConfig

        family = self.family(trust_remote_code)
        settings = self.quantization
        weights = family.weight_format()
        if not settings and weights.bits:  # the adapter of other software, which does not note it
            settings = {f"load_in_{weights.bits}bit": True, "bnb_4bit_compute_dtype": self.dtype}
        return family.model(self.torch_dtype(), BitsAndBytesConfig(**settings) if settings else None)


def convert_words(words: dict[str, Any]) -> str:
    """Returns the arguments of `mft convert`, quoted for a shell, of {"": "qwen", ".path": "/a folder"}."""
    return " ".join(shlex.quote(f"model{key}={value}") for key, value in words.items() if value is not None)


def read_note(folder: Path) -> dict[str, Any]:
    """Returns mft.json of a folder, {} if absent."""
    file = folder / NOTE
    return json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}


def write_note(folder: Path, kind: str, origin: Origin) -> None:
    """Writes mft.json; kind: full | adapter | converted."""
    note = {"format": 1, "kind": kind, "origin": asdict(origin)}
    (folder / NOTE).write_text(json.dumps(note, indent=2) + "\n", encoding="utf-8")


def quantization_settings(config: BitsAndBytesConfig | None) -> dict[str, Any] | None:
    """Returns the arguments that make an equal BitsAndBytesConfig, as plain values; None for none."""
    if config is None:
        return None
    settings = config.to_dict()
    names = ["load_in_4bit", "load_in_8bit", "llm_int8_skip_modules", "bnb_4bit_quant_type"]
    names += ["bnb_4bit_use_double_quant", "bnb_4bit_compute_dtype", "bnb_4bit_quant_storage"]
    return {name: settings[name] for name in names}
