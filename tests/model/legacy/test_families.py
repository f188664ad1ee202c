"""Checkpoints in their original format compute what the original code computed, and leave as native
folders."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from mft.config.build import build
from mft.config.compose import compose_resolved
from mft.errors import UserError
from mft.model.causal_lm import CausalLM
from mft.model.export import save_final, save_native
from mft.model.legacy.families import ChatGLM, Original
from mft.model.legacy.native import NormHead
from mft.model.origin import Origin
from mft.model.peft.qlora import QLora
from mft.model.tiny import byte_tokenizer
from mft.model.token_loss import TokenLoss
from tests.model import originals
from tests.model.legacy.adapters import saved_adapter
from tests.model.rows import alone, batch, inputs

FIXTURES = Path(__file__).parents[2] / "fixtures" / "legacy_models"
NAMES = sorted(p.name for p in FIXTURES.iterdir() if p.is_dir())
BESIDE = Path(__file__).parents[4] / "shared" / "fixtures" / "legacy_models"
"""Where fixtures of all families lie beside the repository, which keeps one of each kind."""
ALL = NAMES + sorted(p.name for p in BESIDE.glob("*") if p.is_dir() and p.name not in NAMES)


def fixture(name: str) -> Path:
    return (FIXTURES if name in NAMES else BESIDE) / name


def family_of(name: str, folder: Path | None = None) -> Original:
    found = build(compose_resolved([f"model={name}", f"model.path={folder or fixture(name)}"]).model, "model")
    found.check()
    return found


def as_tensor(expected: dict[str, np.ndarray], key: str) -> torch.Tensor | None:
    return torch.from_numpy(expected[key]).long() if key in expected else None


@pytest.mark.parametrize("name", ALL)
def test_computes_what_the_original_did(name: str) -> None:
    model = family_of(name).model(torch.float32).eval()
    expected = dict(np.load(fixture(name) / "expected.npz"))
    for case in sorted({key.split(".")[0] for key in expected}):
        mask = as_tensor(expected, f"{case}.attention_mask")
        model.zero_grad()
        out = model(
            input_ids=as_tensor(expected, f"{case}.input_ids"),
            attention_mask=mask,
            labels=as_tensor(expected, f"{case}.labels"),
            use_cache=False,
        )
        out.loss.backward()
        difference = (out.logits - torch.from_numpy(expected[f"{case}.logits"])).abs()
        assert (difference if mask is None else difference[mask.bool()]).max() < 5e-5
        assert abs(out.loss.item() - expected[f"{case}.loss"]) < 1e-5
        head = model.get_output_embeddings().weight
        body = torch.cat([p.grad.flatten() for p in model.parameters() if p is not head]).norm().item()
        assert head.grad.norm().item() == pytest.approx(expected[f"{case}.grad_l2_head"], rel=1e-5)
        assert body == pytest.approx(expected[f"{case}.grad_l2_no_head"], rel=1e-5)


@pytest.mark.parametrize("name", NAMES)
def test_packed_equals_alone_and_leaves_native(name: str, tokenizer, tmp_path: Path) -> None:
    family = family_of(name)
    model = family.model(torch.float32)
    module = TokenLoss(model, family)
    assert module.per_sample
    packed = batch([[9, 14, 3], [20]], 28, model.config.vocab_size)
    whole = module(*inputs(packed))[0]
    for n, one in enumerate(alone(packed)):
        one.sample_BT.zero_()
        assert torch.allclose(whole[packed.sample_BT == n], module(*inputs(one))[0][0], atol=2e-5)
    save_final(module, tokenizer, tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["model_type"] not in (
        "chatglm",
        "qwen",
        "baichuan",
        "aquila",
    )
    again = CausalLM(str(tmp_path))
    again.check()
    native = again.model(torch.float32)
    assert not isinstance(native.get_output_embeddings(), NormHead)
    ids = packed.ids_BT[1:, :20]
    assert torch.allclose(native(input_ids=ids).logits, model(input_ids=ids).logits, atol=2e-5)
    native.eval()
    answers = [
        native.generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=4, do_sample=False, use_cache=cache
        )
        for cache in (True, False)
    ]
    assert torch.equal(*answers)


@pytest.mark.parametrize("name", ["baichuan2_13b", "chatglm2_32k"])
def test_an_adapter_finds_its_original_base(name: str, tokenizer, tmp_path: Path) -> None:
    from peft import PeftModel

    family = family_of(name)
    model = saved_adapter(family, tokenizer, tmp_path / "adapter")
    origin = Origin.read(tmp_path / "adapter")
    again = PeftModel.from_pretrained(origin.load(), str(tmp_path / "adapter")).eval()
    ids = torch.randint(2, 100, (1, 12))
    assert torch.allclose(again(input_ids=ids).logits, model.eval()(input_ids=ids).logits, atol=1e-5)


def changed(name: str, tmp_path: Path, **values: object) -> Path:
    folder = tmp_path / name
    shutil.copytree(FIXTURES / name, folder)
    config = json.loads((folder / "config.json").read_text()) | values
    (folder / "config.json").write_text(json.dumps(config))
    return folder


@pytest.mark.parametrize(
    ("name", "values", "message"),
    [
        ("chatglm2_32k", {"quantization_bit": 4}, "quantised already; give the unquantised checkpoint"),
        ("qwen", {"quantization_config": {"bits": 4}}, "does not name a quantisation method"),
        (
            "chatglm2_32k",
            {"pre_seq_len": 128},
            "pre_seq_len=128 in its config.json has no native counterpart",
        ),
        ("chatglm2_32k", {"rmsnorm": False}, "rmsnorm=False"),
        ("chatglm2_32k", {"post_layer_norm": False}, "post_layer_norm=False"),
        ("chatglm2_32k", {"add_bias_linear": True}, "add_bias_linear=True"),
        ("qwen", {"rotary_pct": 0.5}, r"rotary_pct=0\.5"),
        ("qwen", {"no_bias": False}, "no_bias=False"),
        ("qwen", {"kv_channels": 8}, "kv_channels=8"),
        ("baichuan2_7b", {"z_loss_weight": 0.1}, r"z_loss_weight=0\.1"),
        ("aquila2", {"model_type": "llama"}, "'llama', not 'aquila'; use model=auto"),
    ],
)
def test_refused(name: str, values: dict[str, object], message: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=message):
        family_of(name, changed(name, tmp_path, **values))


def test_baichuans_are_told_apart(tmp_path: Path) -> None:
    for name, alibi, norm in (("baichuan2_7b", False, True), ("baichuan_13b", True, False)):
        vocabulary = 125_696 if norm else 64_000
        folder = changed(name, tmp_path, vocab_size=vocabulary)
        family = family_of("baichuan", folder)
        values = json.loads((folder / "config.json").read_text())
        assert (family.alibi(values), family.normalises(values)) == (alibi, norm)
    with pytest.raises(UserError, match=r"set model\.norm_head=true for Baichuan 2"):
        family_of("baichuan", FIXTURES / "baichuan2_7b")


def test_auto_says_which_choice_reads_it() -> None:
    with pytest.raises(UserError, match="original format, which transformers cannot read; choose model=qwen"):
        CausalLM(str(FIXTURES / "qwen")).check()


def test_rows_per_head(tmp_path: Path) -> None:
    """Without multi-query attention the joint projection is stored per head; regrouped, the model is the
    same."""
    folder = changed("chatglm2_32k", tmp_path, multi_query_attention=True, multi_query_group_num=3)
    weights = load_file(folder / "model.safetensors")
    torch.manual_seed(0)
    for key, tensor in weights.items():
        if "query_key_value" in key:
            weights[key] = torch.randn(3 * 3 * 16, *tensor.shape[1:]) * 0.1
    save_file(weights, folder / "model.safetensors")
    grouped = ChatGLM(str(folder), rope_ratio="positions").model(torch.float32)
    for key, tensor in weights.items():
        if "query_key_value" in key:
            rest = tensor.shape[1:]
            weights[key] = tensor.view(3, 3, 16, *rest).transpose(0, 1).reshape(-1, *rest).contiguous()
    save_file(weights, folder / "model.safetensors")
    config = json.loads((folder / "config.json").read_text()) | {"multi_query_attention": False}
    (folder / "config.json").write_text(json.dumps(config))
    per_head = ChatGLM(str(folder), rope_ratio="positions").model(torch.float32)
    assert all(torch.equal(a, b) for a, b in zip(grouped.parameters(), per_head.parameters(), strict=True))


@pytest.mark.parametrize("name", ["qwen", "aquila2"])
def test_quantised_while_it_is_read(name: str, tmp_path: Path) -> None:
    """4 bits of an original checkpoint are those of the native folder made of it, and adapters train on
    them."""
    family = family_of(name, originals.write(tmp_path / "source", name, intermediate_size=256))
    byte_tokenizer(260).save_pretrained(tmp_path / "source")
    save_native(family, tmp_path / "native")
    mode = QLora(rank=4)
    bits, ids = mode.quantization(torch.float32), torch.arange(2, 30)[None]
    found = [one.model(torch.float32, bits) for one in (family, CausalLM(str(tmp_path / "native")))]
    with torch.no_grad():
        assert torch.equal(*(model(input_ids=ids, use_cache=False).logits for model in found))
    adapted = mode.attach(found[0], family)
    adapted(input_ids=ids, labels=ids).loss.backward()
    assert all(
        p.grad is not None and p.grad.isfinite().all() for p in adapted.parameters() if p.requires_grad
    )
