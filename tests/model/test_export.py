"""What is written loads anywhere and gives the same logits; merging keeps what was learnt."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

from mft.errors import UserError
from mft.model.export import save_final
from mft.model.merge import merge
from mft.model.origin import NOTE
from mft.model.peft.full import Full
from mft.model.peft.lora import Lora
from mft.model.peft.qlora import QLora
from mft.model.save import write_tokenizer
from mft.model.tiny import Tiny
from mft.model.token_loss import TokenLoss

IDS = torch.arange(2, 42)[None]
TEMPLATE = "{% for m in messages %}<s>{{ m['role'] }}\n{{ m['content'] }}{% endfor %}"


def logits(model: torch.nn.Module) -> torch.Tensor:
    model.eval()
    with torch.no_grad():
        return model(input_ids=IDS, use_cache=False).logits.float()


def trained(tiny: Tiny, peft: Full, precision: str = "fp32", std: float = 0.05) -> TokenLoss:
    """A model as if it had been trained: fresh adapters or weights moved at random."""
    compute = {"fp32": torch.float32, "bf16": torch.bfloat16}[precision]
    model = peft.attach(tiny.model(peft.dtype(precision), peft.quantization(compute)), tiny)
    torch.manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name or type(peft) is Full:
                parameter += torch.randn_like(parameter) * std
    return TokenLoss(model, tiny)


def test_full_round_trip(tiny: Tiny, tokenizer, tmp_path: Path) -> None:
    module = trained(tiny, Full())
    tokenizer.chat_template = TEMPLATE
    save_final(module, tokenizer, tmp_path / "final", state_dict=module.state_dict())
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "final", use_safetensors=True)
    assert torch.equal(logits(loaded), logits(module.model))
    assert loaded.config.use_cache  # what is trained without a cache still generates with one
    assert AutoTokenizer.from_pretrained(tmp_path / "final").chat_template == TEMPLATE
    assert json.loads((tmp_path / "final" / NOTE).read_text())["kind"] == "full"
    assert not list((tmp_path / "final").glob("*.bin"))


def test_a_tokenizer_is_written_alike_however_it_was_loaded(tiny_folder: Path, tmp_path: Path) -> None:
    for name, offline in (("online", False), ("offline", True)):
        (tmp_path / name).mkdir()
        write_tokenizer(AutoTokenizer.from_pretrained(tiny_folder, local_files_only=offline), tmp_path / name)
    written = [
        {p.name: p.read_bytes() for p in (tmp_path / name).iterdir()} for name in ("online", "offline")
    ]
    assert written[0] == written[1]
    assert b"local" not in written[0]["tokenizer_config.json"]


@pytest.mark.parametrize("peft", [Lora(), QLora()], ids=["lora", "qlora"])
def test_adapter_round_trip(tiny: Tiny, tokenizer, tmp_path: Path, peft: Lora) -> None:
    module = trained(tiny, peft)
    tokenizer.chat_template = TEMPLATE
    state = {n: p for n, p in module.state_dict().items() if "lora_" in n}
    save_final(module, tokenizer, tmp_path, state_dict=state)
    base = tiny.model(torch.float32, peft.quantization(torch.float32))
    assert torch.equal(logits(PeftModel.from_pretrained(base, tmp_path)), logits(module.model))
    assert AutoTokenizer.from_pretrained(tmp_path).chat_template == TEMPLATE
    note = json.loads((tmp_path / NOTE).read_text())
    assert note["kind"] == "adapter" and note["origin"]["path"] == str(tiny.folder())
    assert (note["origin"]["quantization"] is not None) == isinstance(peft, QLora)
    modules = json.loads((tmp_path / "adapter_config.json").read_text())["target_modules"]
    assert len(modules) > 1 and modules == sorted(modules)


def test_merge_is_exact_in_float32(tiny: Tiny, tokenizer, tmp_path: Path) -> None:
    module = trained(tiny, Lora())
    save_final(module, tokenizer, tmp_path / "adapter")
    result = merge(tmp_path / "adapter", tmp_path / "merged")
    assert result.difference < 1e-5 < result.bound and result.effect > 0.1
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    assert (logits(loaded) - logits(module.model)).abs().max() < 1e-5
    assert AutoTokenizer.from_pretrained(tmp_path / "merged").eos_token == tokenizer.eos_token
    assert not (tmp_path / "merged.part").exists()
    with pytest.raises(UserError, match="exists already"):
        merge(tmp_path / "adapter", tmp_path / "merged")


def test_merge_in_bf16(tiny: Tiny, tokenizer, tmp_path: Path) -> None:
    save_final(trained(tiny, Lora(), "bf16"), tokenizer, tmp_path / "adapter")
    result = merge(tmp_path / "adapter", tmp_path / "merged")
    assert result.difference < result.bound < result.effect
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "merged").dtype == torch.bfloat16


def test_merge_of_qlora_goes_onto_the_dequantised_base(tiny: Tiny, tokenizer, tmp_path: Path) -> None:
    module = trained(tiny, QLora())
    save_final(module, tokenizer, tmp_path / "adapter")
    result = merge(tmp_path / "adapter", tmp_path / "merged")
    expected = logits(module.model)
    merged = logits(AutoModelForCausalLM.from_pretrained(tmp_path / "merged"))
    naive = PeftModel.from_pretrained(tiny.model(torch.float32), tmp_path / "adapter").merge_and_unload()
    assert "quantization_config" not in json.loads((tmp_path / "merged/config.json").read_text())
    assert (merged - expected).abs().max() < 1e-5 < (logits(naive) - expected).abs().max() / 100
    assert result.difference < 1e-5


def test_untrained_and_empty_adapters_are_refused(tiny: Tiny, tokenizer, tmp_path: Path) -> None:
    save_final(trained(tiny, Lora(), std=0.0), tokenizer, tmp_path / "zero")
    with pytest.raises(UserError, match="is untrained"):
        merge(tmp_path / "zero", tmp_path / "merged")
    module = trained(tiny, Lora())
    empty = {n: torch.empty(0) for n in module.state_dict() if "lora_" in n}
    save_final(module, tokenizer, tmp_path / "empty", state_dict=empty)
    with pytest.raises(UserError, match="is empty"):
        merge(tmp_path / "empty", tmp_path / "merged")
    with pytest.raises(UserError, match=r"has no adapter_model\.safetensors"):
        merge(tmp_path, tmp_path / "merged")


def test_another_base_is_refused(tiny: Tiny, cache_dir: Path, tokenizer, tmp_path: Path) -> None:
    save_final(trained(tiny, Lora()), tokenizer, tmp_path / "adapter")
    other = Tiny(cache_dir=str(cache_dir), seed=7).folder()
    with pytest.raises(UserError, match="is not the one the adapter was trained on"):
        merge(tmp_path / "adapter", tmp_path / "merged", base=str(other))
    with pytest.raises(UserError, match=r"the base model of this adapter cannot be used: .*does not exist"):
        merge(tmp_path / "adapter", tmp_path / "merged", base=str(tmp_path / "gone/away"))


def test_a_wrong_merge_is_caught(
    tiny: Tiny, tokenizer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save_final(trained(tiny, Lora()), tokenizer, tmp_path / "adapter")
    monkeypatch.setattr(PeftModel, "merge_and_unload", lambda self, **_: self.unload(), raising=False)
    with pytest.raises(UserError, match="differs from base \\+ adapter"):
        merge(tmp_path / "adapter", tmp_path / "merged")
    assert not (tmp_path / "merged").exists()
