"""The kinds of adapters, and modules trained whole beside them: what is trained is what is saved, loaded and
merged."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from mft.config.compose import compose_resolved
from mft.config.validate import check
from mft.errors import UserError
from mft.model.export import save_final
from mft.model.merge import merge
from mft.model.peft.lora import Lora
from mft.model.peft.qlora import QLora
from mft.model.peft.summary import audit
from mft.model.tiny import Tiny
from tests.model.rows import batch
from tests.model.steps import logits, trained
from tests.tiny_runs import resume, train, two_tasks

IDS = torch.arange(2, 42)[None]
DATA = batch([[20, 9], [30]], 32, 512)

KINDS = {
    "dora": Lora(use_dora=True),
    "dora_4_bit": QLora(use_dora=True),
    "rslora": Lora(use_rslora=True),
    "gaussian": Lora(init="gaussian"),
    "orthogonal": Lora(init="orthogonal"),
    "pissa": Lora(init="pissa"),
    "pissa_rslora": Lora(init="pissa", use_rslora=True),
    "pissa_niter": Lora(init="pissa_niter_4"),
    "olora": Lora(init="olora"),
    "embedding": Lora(modules_to_save=["embed_tokens"]),
    "head": Lora(modules_to_save=["lm_head"]),
    "head_4_bit": QLora(modules_to_save=["lm_head"]),
    "both_and_norm": Lora(modules_to_save=["embed_tokens", "lm_head", "norm"]),
    "pissa_and_head": Lora(init="pissa", modules_to_save=["lm_head"]),
    "8_bit": QLora(bits=8),
}
UNTIED_TOO = ("embedding", "head", "both_and_norm")
CASES = [(kind, True) for kind in KINDS] + [(kind, False) for kind in UNTIED_TOO]


@pytest.mark.parametrize(("kind", "tied"), CASES)
def test_trained_saved_loaded_merged(
    kind: str, tied: bool, cache_dir: Path, tokenizer, tmp_path: Path
) -> None:
    family, peft = Tiny(cache_dir=str(cache_dir), tied=tied), KINDS[kind]
    peft.rank = 4
    peft.check()
    before = logits(family.model(torch.float32, peft.quantization(torch.float32)), IDS)
    begun = logits(trained(peft, family, DATA, steps=0).model, IDS)
    assert (begun - before).abs().max() < 1e-5  # no kind changes what the model says before it is trained
    module = trained(peft, family, DATA)
    expected = logits(module.model, IDS)
    assert (expected - before).abs().max() > 0.1
    save_final(module, tokenizer, tmp_path / "adapter")
    base = family.model(torch.float32, peft.quantization(torch.float32))
    loaded = logits(PeftModel.from_pretrained(base, tmp_path / "adapter"), IDS)
    assert (loaded - expected).abs().max() < (1e-5 if peft.changes_base else 1e-30)
    result = merge(tmp_path / "adapter", tmp_path / "merged")
    assert (
        result.difference < (1e-5 if kind != "8_bit" else result.bound) and result.bound < result.effect / 10
    )
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    assert (logits(merged, IDS) - expected).abs().max() < (1e-5 if kind != "8_bit" else result.bound)
    assert merged.config.tie_word_embeddings == tied
    assert (merged.lm_head.weight is merged.model.embed_tokens.weight) == tied


def test_what_began_as_a_part_of_the_base_is_saved_as_an_ordinary_adapter(
    tiny: Tiny, tokenizer, tmp_path: Path
) -> None:
    save_final(trained(Lora(rank=4, init="pissa"), tiny, DATA), tokenizer, tmp_path)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"], config["init_lora_weights"]) == (8, 64.0, True)
    shapes = {
        tuple(t.shape) for n, t in load_file(tmp_path / "adapter_model.safetensors").items() if "q_proj" in n
    }
    assert shapes == {(8, 64), (64, 8)}


def test_settings_reach_peft(tiny: Tiny) -> None:
    peft = Lora(rank=4, alpha=8, use_dora=True, use_rslora=True)
    layer = peft.attach(tiny.model(torch.float32), tiny).base_model.model.model.layers[0].self_attn.q_proj
    assert layer.scaling["default"] == 8 / 4**0.5
    assert layer.lora_magnitude_vector["default"].weight.shape == (64,)
    plain = Lora(rank=4, alpha=8).attach(tiny.model(torch.float32), tiny).base_model.model.model.layers[0]
    assert plain.self_attn.q_proj.scaling["default"] == 2 and not plain.self_attn.q_proj.lora_magnitude_vector
    # the largest singular values have gone over into the adapter
    weight = tiny.model(torch.float32).model.layers[0].self_attn.q_proj.weight
    rest = Lora(rank=4, init="pissa").attach(tiny.model(torch.float32), tiny).base_model.model.model.layers[0]
    left = torch.linalg.svdvals(rest.self_attn.q_proj.base_layer.weight.detach())
    assert (
        torch.allclose(left[:-4], torch.linalg.svdvals(weight.detach())[4:], atol=1e-5)
        and left[-4:].max() < 1e-5
    )


@pytest.mark.parametrize("tied", [True, False])
def test_tied_modules_are_trained_as_one_and_in_float32(tied: bool, cache_dir: Path) -> None:
    family = Tiny(cache_dir=str(cache_dir), tied=tied)
    model = Lora(modules_to_save=["lm_head"]).attach(family.model(torch.bfloat16), family)
    whole = {n: p for n, p in model.named_parameters() if p.requires_grad and "lora_" not in n}
    assert [p.dtype for p in whole.values()] == [torch.float32]
    base = model.get_base_model()
    assert (base.get_output_embeddings().weight is base.get_input_embeddings().weight) == tied
    row = next(row for row in audit(model) if row.kind == ("model.embed_tokens" if tied else "lm_head"))
    assert row.trainable == 512 * 64 and row.adapted == 1


def test_goes_on_from_an_adapter_with_whole_modules(tiny: Tiny, tokenizer, tmp_path: Path) -> None:
    first = trained(Lora(rank=4, modules_to_save=["lm_head"]), tiny, DATA)
    save_final(first, tokenizer, tmp_path)
    again = Lora(path=str(tmp_path)).attach(tiny.model(torch.float32), tiny)
    assert torch.equal(logits(again, IDS), logits(first.model, IDS))
    assert {n for n, p in again.named_parameters() if p.requires_grad} == {
        n for n, p in first.model.named_parameters() if p.requires_grad
    }


def test_an_init_counts_the_same_in_any_case() -> None:
    peft = Lora(init="PiSSA")
    peft.check()
    assert peft.changes_base and peft.full_weights_reason == "peft.init=PiSSA"
    assert not Lora(init="True").changes_base


@pytest.mark.parametrize(
    ("peft", "message"),
    [
        (Lora(init="pisa"), r"peft\.init='pisa' is not one of true, gaussian, .*; did you mean pissa"),
        (
            Lora(init="eva"),
            r"peft\.init=eva needs a pass over calibration data, which mft does not support",
        ),
        (QLora(init="PiSSA"), r"peft\.init=PiSSA would change quantised weights"),
        (Lora(init="orthogonal", rank=3), r"peft\.init=orthogonal needs an even rank, not peft\.rank=3"),
        (
            QLora(init="pissa"),
            r"peft\.init=pissa would change quantised weights; use peft\.init=true, or peft=lora",
        ),
        (QLora(init="olora"), r"peft\.init=olora would change quantised weights"),
        (QLora(bits=8, use_dora=True), r"use peft\.bits=4 or peft\.use_dora=false"),
    ],
)
def test_refused_before_loading(peft: Lora, message: str) -> None:
    with pytest.raises(UserError, match=message):
        peft.check()


@pytest.mark.parametrize(
    ("peft", "message"),
    [
        (Lora(modules_to_save=["lmhead"]), r"'lmhead' matches no module; .*; did you mean lm_head"),
        (
            Lora(modules_to_save=["q_proj"]),
            r"layers\.0\.self_attn\.q_proj is trained in full, but .* is in peft\.targets",
        ),
        (
            Lora(targets=["q_proj", "lm_head"]),
            r"lm_head is one weight as embedding and output layer.*modules_to_save=\[lm_head\]",
        ),
        (Lora(targets=["embed_tokens"]), r"embed_tokens is one weight as embedding and output layer"),
        (
            QLora(targets=["q_proj"], modules_to_save=["up_proj"]),
            r"up_proj is quantised; leave it out",
        ),
    ],
)
def test_refused_when_the_model_is_known(peft: Lora, message: str, tiny: Tiny) -> None:
    with pytest.raises(UserError, match=message):
        peft.attach(tiny.model(torch.float32, peft.quantization(torch.float32)), tiny)


def test_an_untied_embedding_takes_an_adapter_of_the_plain_kind(
    cache_dir: Path, tokenizer, tmp_path: Path
) -> None:
    family = Tiny(cache_dir=str(cache_dir), tied=False)
    with pytest.raises(
        UserError,
        match=r"an adapter of the embedding .*embed_tokens needs peft\.use_dora=false and peft\.init=true or gaussian",
    ):
        Lora(targets=["embed_tokens"], init="pissa").attach(family.model(torch.float32), family)
    module = trained(Lora(rank=4, targets=["embed_tokens", "lm_head"]), family, DATA)
    save_final(module, tokenizer, tmp_path / "adapter")
    loaded = PeftModel.from_pretrained(family.model(torch.float32), tmp_path / "adapter")
    assert torch.equal(logits(loaded, IDS), logits(module.model, IDS))
    assert merge(tmp_path / "adapter", tmp_path / "merged").difference < 1e-5


def test_a_backend_that_never_holds_whole_weights_is_refused(tmp_path: Path, cache_dir: Path) -> None:
    settings = ["model=tiny", f"cache_dir={cache_dir}", two_tasks(tmp_path), "dist=zero3"]
    asked = {
        "peft.init=pissa": "peft.init=pissa",
        "peft.use_dora=true": "peft.use_dora=true",
        "model.add_tokens": 'model.add_tokens=["<x>"]',
    }
    for said, override in asked.items():
        with pytest.raises(UserError, match=rf"{said} reads whole weights of the base.*choose dist=fsdp"):
            check(compose_resolved([*settings, "peft=lora", override]), world=1)
    check(compose_resolved([*settings, "peft=lora", "peft.modules_to_save=[lm_head]"]), world=1)


@pytest.mark.slow
@pytest.mark.parametrize(
    "settings",
    [
        ["peft=qlora", "peft.use_dora=true", "peft.use_rslora=true", "peft.dropout=0.1"],
        ["peft=lora", "peft.init=pissa", "peft.modules_to_save=[lm_head]", "model.tied=true"],
    ],
    ids=["qdora", "pissa_tied_head"],
)
def test_a_run_resumes_to_the_bit(settings: list[str], tmp_path: Path, cache_dir: Path) -> None:
    settings = [*settings, "train.max_steps=4", "train.save_every=2", "optimizer.lr=1e-3"]
    _, run_dir = train(tmp_path, cache_dir, *settings)
    whole = load_file(run_dir / "final" / "adapter_model.safetensors")
    assert resume(tmp_path, cache_dir, *settings, step=2)["status"] == "finished"
    again = load_file(run_dir / "final" / "adapter_model.safetensors")
    assert whole.keys() == again.keys() and all(torch.equal(whole[name], again[name]) for name in whole)
