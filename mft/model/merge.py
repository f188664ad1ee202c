"""Merges an adapter into its base, and verifies the logits of the result against base + adapter."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from mft.errors import UserError
from mft.files.checksums import require_sound
from mft.model.causal_lm import CausalLM
from mft.model.origin import Origin
from mft.model.save import check_out, new_folder, put, write_model, write_tokenizer

if TYPE_CHECKING:
    import torch
    from torch import nn


@dataclass(frozen=True)
class Merged:
    """Result of a merge; the numbers are in logits, measured on a few sequences."""

    folder: Path
    """The merged model."""

    difference: float
    """Largest absolute difference to base + adapter."""

    bound: float
    """What `difference` had to stay below."""

    effect: float
    """Largest absolute difference that the adapter makes to the base, to compare with."""

    def __str__(self) -> str:
        return (
            f"largest difference of its logits to base + adapter: {self.difference:.2g} "
            f"(limit: {self.bound:.2g}; the adapter's full effect: {self.effect:.2g})"
        )


TOLERANCE = {"float32": 1e-4, "bfloat16": 0.05, "float16": 0.01}
"""Largest accepted difference of merged logits, as a share of the largest logit. A half-precision weight
rounds the update it takes up by up to 2**-9 (bf16) or 2**-12 (fp16) of itself in every layer; a wrong merge
is off by its full effect."""

TOLERANCE_8_BIT = 0.05
"""The same for an 8-bit base, whose layers round their inputs to 1/127 of the largest one in each row, which
the merged model does not: up to 0.021 of the largest logit on the tiny models here, where the adapter's
effect is about 1."""

PROBES = (
    "def add(a, b):\n    return a + b\n",
    "Explain what a hash table is.",
    "for i in range(10):\n    print(i)\n",
)


def merge(adapter: Path, out: Path, base: str | None = None, trust_remote_code: bool = False) -> Merged:
    """Writes base + adapter as one plain Hugging Face folder and compares its logits with theirs.

    base: where the base model is, if not where mft.json says.
    The adapter of a 4-bit base is merged into the dequantised 4-bit weights, which it was trained to correct:
    on the original weights it would be slightly off, and merged into 4 bits most of it would be rounded away.
    Raises UserError for an empty or untrained adapter, an existing `out`, and logits beyond the bound.
    """
    from peft import PeftModel
    from transformers import AutoTokenizer

    check_out(out)
    require_sound(adapter)
    refuse_untrained(adapter)
    origin = Origin.read(adapter, base)
    tokenizer = AutoTokenizer.from_pretrained(str(adapter))
    options = {"add_special_tokens": False, "return_tensors": "pt"}
    probes = [tokenizer(text, **options).input_ids[:, :64] for text in PROBES]

    model = PeftModel.from_pretrained(origin.load(trust_remote_code), str(adapter)).eval()
    expected = _logits(model, probes)
    with model.disable_adapter():
        effect = _difference(expected, _logits(model, probes))
    del model  # before the second copy is loaded

    plain = origin.load(trust_remote_code)
    held = getattr(plain.config, "quantization_config", None)
    # What merge_and_unload makes of packed weights would be packed again.
    if held is not None:
        plain = plain.dequantize(origin.torch_dtype())
    # safe_merge refuses an adapter whose weights are not finite
    plain = PeftModel.from_pretrained(plain, str(adapter)).merge_and_unload(safe_merge=True)
    part = new_folder(out)
    write_model(plain, part)
    write_tokenizer(tokenizer, part)
    del plain

    # Read from the disk: this is what will be used, and saving may have changed it.
    written = CausalLM(str(part), trust_remote_code=trust_remote_code).model(origin.torch_dtype()).eval()
    difference = _difference(expected, _logits(written, probes))
    rounding = TOLERANCE_8_BIT if getattr(held, "load_in_8bit", False) else 0.0
    bound = max(TOLERANCE[origin.dtype], rounding) * expected.abs().max().item()
    if not difference <= bound:  # also for NaN
        raise UserError(
            f"the merged model differs from base + adapter by {difference:.3g} in its logits, more than "
            f"{bound:.3g} (the adapter's full effect is {effect:.3g}); it was left in {part}"
        )
    put(part, out)
    return Merged(out, difference, bound, effect)


def refuse_untrained(adapter: Path) -> None:
    """Raises UserError for an adapter folder without weights, with empty tensors, or whose B matrices are all
    zero."""
    from safetensors import safe_open

    file = adapter / "adapter_model.safetensors"
    if not file.exists():
        raise UserError(f"{adapter} has no adapter_model.safetensors")
    with safe_open(str(file), "pt") as tensors:
        names = list(tensors.keys())
        if not names or any(0 in tensors.get_slice(name).get_shape() for name in names):
            reason = "was saved without gathering its weights from all ranks"
            raise UserError(f"the adapter in {adapter} is empty: it {reason}")
        outputs = [name for name in names if "lora_B" in name or "lora_embedding_B" in name]
        if outputs and not any(tensors.get_tensor(name).any() for name in outputs):
            raise UserError(f"the adapter in {adapter} is untrained: all its B matrices are zero")


def _logits(model: nn.Module, probes: list[torch.Tensor]) -> torch.Tensor:
    """Returns the float32 logits [n, V] of all positions of the probes, on the CPU."""
    import torch

    device = next(model.parameters()).device
    with torch.no_grad():
        logits = [model(input_ids=ids.to(device), use_cache=False).logits[0] for ids in probes]
    return torch.cat(logits).float().cpu()


def _difference(one: torch.Tensor, other: torch.Tensor) -> float:
    # torch's max, unlike Python's, lets a NaN through
    return (one - other).abs().max().item()
