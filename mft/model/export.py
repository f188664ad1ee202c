"""Writing what was trained as a folder that transformers and peft load, and merging an adapter into its base.

Beside the weights lies `mft.json`: the base model with its fingerprint, the dtype and the quantisation it was trained
in.
"""

from __future__ import annotations

import json
import shutil
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mft.errors import UserError
from mft.model.family import CausalLM
from mft.model.legacy import Original, from_options

if TYPE_CHECKING:
    import torch
    from transformers import BitsAndBytesConfig, PreTrainedTokenizerBase

NOTE = "mft.json"


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

        An adapter made elsewhere has no mft.json: its base is taken from adapter_config.json, unquantised.
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
        return replace(origin, path=base) if base else origin

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

        quantization = BitsAndBytesConfig(**self.quantization) if self.quantization else None
        return self.family(trust_remote_code).model(self.torch_dtype(), quantization)


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
    from mft.model.forward import TokenLoss
    from mft.model.native import plain_rows
    from mft.model.parts import base_of, with_ties
    from mft.model.start import difference

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
        weights, changed = difference(model, weights)
        model.save_pretrained(str(folder), state_dict=weights, save_embedding_layers=False)
        _edit_json(folder / "adapter_config.json", **changed)
    else:
        state_dict = plain_rows(base, model.state_dict() if state_dict is None else state_dict)
        if dtype is not None:
            state_dict = {k: v.to(dtype) if v.is_floating_point() else v for k, v in state_dict.items()}
        model.save_pretrained(str(folder), state_dict=state_dict)
        if dtype is not None:
            _edit_json(folder / "config.json", dtype=str(dtype).removeprefix("torch."))
    tokenizer.save_pretrained(str(folder))
    if origin is not None:
        note = {"format": 1, "kind": "full" if base is model else "adapter", "origin": asdict(origin)}
        (folder / NOTE).write_text(json.dumps(note, indent=2) + "\n", encoding="utf-8")


def _edit_json(path: Path, **values: Any) -> None:
    path.write_text(
        json.dumps(json.loads(path.read_text(encoding="utf-8")) | values, indent=2) + "\n", encoding="utf-8"
    )


def quantization_settings(config: BitsAndBytesConfig | None) -> dict[str, Any] | None:
    """Returns the arguments that make an equal BitsAndBytesConfig, as plain values; None for none."""
    if config is None:
        return None
    settings = config.to_dict()
    names = ["load_in_4bit", "load_in_8bit", "llm_int8_skip_modules", "bnb_4bit_quant_type"]
    names += ["bnb_4bit_use_double_quant", "bnb_4bit_compute_dtype", "bnb_4bit_quant_storage"]
    return {name: settings[name] for name in names}


@dataclass(frozen=True)
class Merged:
    """Result of a merge. difference: largest absolute difference of its logits to base + adapter, on a few sequences;
    bound: what it had to stay below; effect: largest absolute difference the adapter makes to the base's logits, to
    compare with."""

    folder: Path
    difference: float
    bound: float
    effect: float

    def __str__(self) -> str:
        return (
            f"largest difference of its logits to base + adapter: {self.difference:.2g} "
            f"(allowed: {self.bound:.2g}; the adapter's whole effect: {self.effect:.2g})"
        )


TOLERANCE = {"float32": 1e-4, "bfloat16": 0.05, "float16": 0.01}
"""Largest accepted difference of merged logits, as a share of the largest logit. A half-precision weight rounds the
update it takes up by up to 2**-9 (bf16) or 2**-12 (fp16) of itself in every layer; a wrong merge is off by its whole
effect."""

TOLERANCE_8_BIT = 0.05
"""The same for an 8-bit base, whose layers round their inputs to 1/127 of the largest one in each row, which the merged
model does not: up to 0.021 of the largest logit on the tiny models here, where the adapter's effect is about 1."""

PROBES = ("def add(a, b):\n    return a + b\n", "Explain what a hash table is.", "for i in range(10):\n    print(i)\n")


def merge(
    adapter: Path | str,
    out: Path | str,
    base: str | None = None,
    tokenizer: PreTrainedTokenizerBase | None = None,
    trust_remote_code: bool = False,
) -> Merged:
    """Writes base + adapter as one plain Hugging Face folder and compares its logits with theirs.

    base: where the base model is, if not where mft.json says; tokenizer: default is the adapter folder's own.
    The adapter of a 4-bit base is merged into the dequantised 4-bit weights, which it was trained to correct: on the
    original weights it would be slightly off, and merged into 4 bits most of it would be rounded away.
    Raises UserError for an empty or untrained adapter, an existing `out`, and logits beyond the bound.
    """
    from peft import PeftModel
    from transformers import AutoTokenizer

    from mft.model.native import plain_rows

    adapter, out = Path(adapter), Path(out)
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UserError(f"out={out} exists already; give a folder that does not")
    refuse_untrained(adapter)
    origin = Origin.read(adapter, base)
    tokenizer = tokenizer or AutoTokenizer.from_pretrained(str(adapter))
    probes = [tokenizer(text, add_special_tokens=False, return_tensors="pt").input_ids[:, :64] for text in PROBES]

    model = PeftModel.from_pretrained(origin.load(trust_remote_code), str(adapter)).eval()
    expected = _logits(model, probes)
    with model.disable_adapter():
        effect = _difference(expected, _logits(model, probes))
    del model  # before the second copy is loaded

    plain = origin.load(trust_remote_code)
    if origin.quantization:
        plain = plain.dequantize(origin.torch_dtype())
    # safe_merge: refuses an adapter whose weights are not finite
    plain = PeftModel.from_pretrained(plain, str(adapter)).merge_and_unload(safe_merge=True)
    part = out.with_name(out.name + ".part")
    shutil.rmtree(part, ignore_errors=True)
    part.mkdir(parents=True)
    plain.save_pretrained(str(part), state_dict=plain_rows(plain, plain.state_dict()))
    tokenizer.save_pretrained(str(part))
    del plain

    written = CausalLM(str(part), trust_remote_code=trust_remote_code).model(origin.torch_dtype()).eval()
    difference = _difference(expected, _logits(written, probes))
    rounding = TOLERANCE_8_BIT if (origin.quantization or {}).get("load_in_8bit") else 0.0
    bound = max(TOLERANCE[origin.dtype], rounding) * max(logits.abs().max().item() for logits in expected)
    if not difference <= bound:  # also for NaN
        raise UserError(
            f"the merged model differs from base + adapter by {difference:.3g} in its logits, more than {bound:.3g} "
            f"(the adapter's whole effect is {effect:.3g}); it was left in {part}"
        )
    if out.exists():
        out.rmdir()
    part.rename(out)
    return Merged(out, difference, bound, effect)


def refuse_untrained(adapter: Path) -> None:
    """Raises UserError for an adapter folder without weights, with empty tensors, or whose B matrices are all zero."""
    from safetensors import safe_open

    file = adapter / "adapter_model.safetensors"
    if not file.exists():
        raise UserError(f"{adapter} has no adapter_model.safetensors")
    with safe_open(str(file), "pt") as tensors:
        names = list(tensors.keys())
        if not names or any(0 in tensors.get_slice(name).get_shape() for name in names):
            raise UserError(
                f"the adapter in {adapter} is empty: it was saved without gathering its weights from all ranks"
            )
        outputs = [name for name in names if "lora_B" in name or "lora_embedding_B" in name]
        if outputs and not any(tensors.get_tensor(name).any() for name in outputs):
            raise UserError(
                f"the adapter in {adapter} is untrained: all its B matrices are zero, so merging changes nothing"
            )


def _logits(model: Any, probes: list[torch.Tensor]) -> list[torch.Tensor]:
    import torch

    device = next(model.parameters()).device
    with torch.no_grad():
        return [model(input_ids=ids.to(device), use_cache=False).logits.float().cpu() for ids in probes]


def _difference(one: list[torch.Tensor], other: list[torch.Tensor]) -> float:
    # torch's max, unlike Python's, lets a NaN through
    import torch

    return torch.stack([(a - b).abs().max() for a, b in zip(one, other, strict=True)]).max().item()
