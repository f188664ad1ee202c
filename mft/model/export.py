"""Writing what was trained, or read from an original format, as a folder that transformers and peft load.

Beside the weights lies `mft.json`: the base model with its fingerprint, the dtype and the quantisation it was trained
in.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mft.errors import UserError
from mft.model.causal_lm import CausalLM
from mft.model.legacy.families import Original, from_options
from mft.model.quantised_checkpoint import refuse_quantised
from mft.model.save import edit_json, new_folder, put, write_model, write_tokenizer

if TYPE_CHECKING:
    import torch
    from transformers import BitsAndBytesConfig, PreTrainedTokenizerBase

NOTE = "mft.json"
CONVERTED = "converted"
"""Kind of a folder that `save_native` wrote."""


@dataclass(frozen=True)
class Origin:
    """What a trained folder was made from.

    quantization: arguments of BitsAndBytesConfig, None for an unquantised base; dtype: of the base's unquantised
    weights while training, e.g. bfloat16; original: how a base in an original format is read (Original.options), None
    for a native one; tokens: what was added to its vocabulary (CausalLM.new_tokens), None for nothing.
    """

    path: str
    revision: str | None = None
    fingerprint: str = ""
    dtype: str = "float32"
    quantization: dict[str, Any] | None = None
    original: dict[str, Any] | None = None
    tokens: dict[str, Any] | None = None

    @classmethod
    def of(cls, base: Any, family: CausalLM) -> Origin:
        """Returns the origin of what is trained from `base`, a loaded transformers model of that family."""
        # The first parameter belongs to the embedding, which is neither quantised nor an adapter's.
        dtype = str(next(base.parameters()).dtype).removeprefix("torch.")
        quantization = quantization_settings(getattr(base.config, "quantization_config", None))
        original = family.options() if isinstance(family, Original) else None
        made = (family.source(), family.revision, family.fingerprint(), dtype, quantization, original)
        return cls(*made, tokens=family.new_tokens())

    @classmethod
    def read(cls, folder: Path, base: str | None = None) -> Origin:
        """Returns the origin of a trained folder; `base` replaces the base's path where it has moved.

        An adapter made elsewhere has no mft.json: its base is taken from adapter_config.json, unquantised. A base that
        `save_native` made of the one that was trained on is as good as that one.
        """
        note, config = folder / NOTE, folder / "adapter_config.json"
        if note.exists():
            values = json.loads(note.read_text(encoding="utf-8"))["origin"]
            origin = cls(**{k: v for k, v in values.items() if k in cls.__dataclass_fields__})
        elif config.exists():
            values = json.loads(config.read_text(encoding="utf-8"))
            origin = cls(values.get("base_model_name_or_path") or "", values.get("revision"))
        else:
            raise UserError(f"{folder} holds neither {NOTE} nor adapter_config.json, so its base model is unknown")
        if not base:
            return origin
        file = Path(base).expanduser() / NOTE
        note = json.loads(file.read_text(encoding="utf-8")) if file.exists() else {}
        if note.get("kind") == CONVERTED and note["origin"]["fingerprint"] == origin.fingerprint:
            return replace(origin, path=base, revision=None, original=None, fingerprint="")
        return replace(origin, path=base)

    def family(self, trust_remote_code: bool = False) -> CausalLM:
        """Returns the base model; raises UserError when it is missing or is not the one that was trained on."""
        where = {"path": self.path, "revision": self.revision, **(self.tokens or {})}
        family = (
            from_options(self.original, **where)
            if self.original
            else CausalLM(**where, trust_remote_code=trust_remote_code)
        )
        try:
            family.check()
            weights = family.weight_format()
            refuse_quantised(self.path, weights, weights.bits)
        except UserError as error:
            raise UserError(
                f"the base model of this adapter cannot be used: {error}; give another with base="
            ) from error
        if self.fingerprint and family.fingerprint() != self.fingerprint:
            raise UserError(
                f"the base model {self.path} is not the one the adapter was trained on: its fingerprint is "
                f"{family.fingerprint()}, not {self.fingerprint}; give the right one with base="
            )
        return family

    def torch_dtype(self) -> torch.dtype:
        import torch

        return getattr(torch, self.dtype)

    def load(self, trust_remote_code: bool = False) -> Any:
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


def save_final(
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    folder: Path | str,
    state_dict: dict[str, torch.Tensor] | None = None,
    origin: Origin | None = None,
    dtype: torch.dtype | None = None,
) -> None:
    """Writes an adapter folder (peft) or a model folder (transformers), safetensors, with the tokenizer and its chat
    template.

    model: a TokenLoss, or the plain or peft model inside it; state_dict: of `model`, as gathered by the engine from all
    ranks (default: its own); origin: goes into mft.json (default: known from a TokenLoss, else none is written);
    dtype: of a full model's weights on disk (default: as they are).
    Rank 0 calls it: inside a process group transformers writes nothing on the others, without an error.
    """
    from mft.model.introspect import base_of, with_ties
    from mft.model.legacy.native import plain_rows
    from mft.model.peft.init import relative_to_base
    from mft.model.token_loss import TokenLoss

    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    if isinstance(model, TokenLoss):
        origin = origin or Origin.of(base_of(model.model), model.family)
        model = model.model
        if state_dict is not None:
            state_dict = {name.removeprefix("model."): tensor for name, tensor in state_dict.items()}
    base = base_of(model)
    if base is not model:
        # Without this peft asks the hub for the base's config, to see whether its vocabulary was resized.
        weights = plain_rows(base, model.state_dict() if state_dict is None else with_ties(model, state_dict))
        weights, changed = relative_to_base(model, weights)
        model.save_pretrained(str(folder), state_dict=weights, save_embedding_layers=False)
        edit_json(folder / "adapter_config.json", lambda values: values | changed)
    else:
        write_model(model, folder, state_dict, dtype)
    write_tokenizer(tokenizer, folder)
    if origin is not None:
        _write_note(folder, "full" if base is model else "adapter", origin)


def _write_note(folder: Path, kind: str, origin: Origin) -> None:
    note = {"format": 1, "kind": kind, "origin": asdict(origin)}
    (folder / NOTE).write_text(json.dumps(note, indent=2) + "\n", encoding="utf-8")


def save_native(family: CausalLM, out: Path) -> None:
    """Writes a checkpoint in its original format, or a quantised one dequantised, as a native folder, its weights in
    the dtype they have, or that the config of a quantised one names (bfloat16 if none).

    An adapter trained on the one works on the other. Raises UserError when `out` exists already.
    """
    import torch

    part = new_folder(out)
    stored: Any = "auto"
    quantised = bool(family.weight_format().method)
    model = family.dequantised(family.config().dtype or torch.bfloat16) if quantised else family.model(stored)
    write_model(model, part)
    write_tokenizer(family.tokenizer(), part)
    _write_note(part, CONVERTED, Origin.of(model, family))
    put(part, out)


def quantization_settings(config: BitsAndBytesConfig | None) -> dict[str, Any] | None:
    """Returns the arguments that make an equal BitsAndBytesConfig, as plain values; None for none."""
    if config is None:
        return None
    settings = config.to_dict()
    names = ["load_in_4bit", "load_in_8bit", "llm_int8_skip_modules", "bnb_4bit_quant_type"]
    names += ["bnb_4bit_use_double_quant", "bnb_4bit_compute_dtype", "bnb_4bit_quant_storage"]
    return {name: settings[name] for name in names}
