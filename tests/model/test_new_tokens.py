"""New tokens: in the tokenizer, as rows of embedding and head, trained, saved, loaded, merged, asked."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from mft.batch import Batch
from mft.data.tokenize import Encoder
from mft.errors import UserError
from mft.model.causal_lm import CausalLM
from mft.model.export import save_final
from mft.model.generate import Answerer
from mft.model.merge import merge
from mft.model.origin import Origin
from mft.model.peft.full import Full
from mft.model.peft.lora import Lora
from mft.model.peft.qlora import QLora
from mft.model.tiny import Tiny
from mft.model.token_loss import TokenLoss
from tests.model.rows import inputs
from tests.model.steps import logits, trained
from tests.tiny_runs import resume, train

ADDED = {"add_tokens": ["<sql>", "SELECT"], "add_special_tokens": ["<|call|>"]}
PEFTS = {
    "full": Full(),
    "lora": Lora(rank=4),
    "qlora": QLora(rank=4),
    "8_bit": QLora(rank=4, bits=8),
    "whole": Lora(rank=4, modules_to_save=["embed_tokens", "lm_head"]),
    "embedding": Lora(rank=4, modules_to_save=["embed_tokens"]),
    "dora": Lora(rank=4, use_dora=True),
    "pissa": Lora(rank=4, init="pissa"),
}


def family(cache_dir: Path, tied: bool = True, **values: object) -> Tiny:
    return Tiny(cache_dir=str(cache_dir), tied=tied, **(ADDED | {"pad_to_multiple_of": 16} | values))


def batch(tokenizer) -> Batch:
    ids = torch.tensor(
        [tokenizer("a <sql> SELECT b<|call|> def SELECT <sql>", add_special_tokens=False).input_ids]
    )
    target = torch.cat([ids[:, 1:], torch.tensor([[-100]])], 1)
    zeros = torch.zeros_like(ids)
    return Batch(ids, target, zeros, zeros, torch.arange(ids.shape[1])[None])


def test_tokenizer_and_rows(cache_dir: Path, tmp_path: Path) -> None:
    plain, tiny = Tiny(cache_dir=str(cache_dir)), family(cache_dir)
    tokenizer, old = tiny.tokenizer(), plain.tokenizer()
    ids = tokenizer.convert_tokens_to_ids(["<sql>", "SELECT", "<|call|>"])
    assert ids == [len(old), len(old) + 1, len(old) + 2]
    said = tokenizer("x<sql>SELECT<|call|>y", add_special_tokens=False).input_ids
    assert said[1:4] == ids and len(said) == 5
    assert tokenizer.decode(said, skip_special_tokens=True) == "x<sql>SELECTy"
    model, base = tiny.model(torch.float32), plain.model(torch.float32)
    rows = model.get_input_embeddings().weight
    assert rows.shape[0] == 512 == model.config.vocab_size  # 512 rows had room for them
    mean = base.get_input_embeddings().weight[: len(old)].mean(0)
    for row in ids:
        assert torch.allclose(rows[row], mean, atol=1e-7)
    assert torch.equal(rows[: ids[0]], base.get_input_embeddings().weight[: ids[0]])
    tokenizer.save_pretrained(tmp_path)
    assert (
        AutoTokenizer.from_pretrained(tmp_path).convert_tokens_to_ids(["<sql>", "SELECT", "<|call|>"]) == ids
    )
    # one of them may end the answers
    assert family(cache_dir, eos_token="<|call|>").tokenizer().eos_token_id == ids[2]


@pytest.mark.parametrize("tied", [True, False])
def test_rows_grow_to_a_multiple(tied: bool, cache_dir: Path) -> None:
    many = [f"<t{i}>" for i in range(60)]
    tiny = family(cache_dir, tied, add_tokens=many, add_special_tokens=[], pad_to_multiple_of=64)
    model = tiny.model(torch.float32)
    last = tiny.tokenizer().convert_tokens_to_ids("<t59>")
    size = -(-(last + 1) // 64) * 64
    assert size > 512 and model.config.vocab_size == size
    assert (
        model.get_input_embeddings().weight.shape[0] == model.get_output_embeddings().weight.shape[0] == size
    )
    assert (model.get_output_embeddings().weight is model.get_input_embeddings().weight) == tied
    again = tiny.model(torch.float32)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), again.parameters(), strict=True))


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("kind", PEFTS)
def test_trained_saved_loaded_merged(kind: str, tied: bool, cache_dir: Path, tmp_path: Path) -> None:
    many = [f"<t{i}>" for i in range(60)] if kind in ("lora", "whole", "full", "qlora") else []
    peft, tiny = PEFTS[kind], family(cache_dir, tied, add_tokens=[*ADDED["add_tokens"], *many])
    tokenizer = tiny.tokenizer()
    before = logits(tiny.model(torch.float32, peft.quantization(torch.float32)), batch(tokenizer).ids_BT)
    module = trained(peft, tiny, batch(tiny.tokenizer()))
    expected = logits(module.model, batch(tokenizer).ids_BT)
    assert (expected - before).abs().max() > 0.1
    new = tokenizer.convert_tokens_to_ids("<sql>")
    assert expected[0, 0, new] != before[0, 0, new]
    save_final(module, tokenizer, tmp_path / "final")
    if kind == "full":
        loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "final")
        assert torch.equal(logits(loaded, batch(tokenizer).ids_BT), expected)
        return
    base = Origin.read(tmp_path / "final").load()
    loaded = PeftModel.from_pretrained(base, tmp_path / "final")
    assert (logits(loaded, batch(tokenizer).ids_BT) - expected).abs().max() < (
        1e-5 if kind == "pissa" else 1e-30
    )
    saved = load_file(tmp_path / "final" / "adapter_model.safetensors")
    deltas = {n: t for n, t in saved.items() if "trainable_tokens_delta" in n}
    assert len(deltas) == {"whole": 0, "embedding": 0 if tied else 1}.get(kind, 1 if tied else 2)
    if deltas and kind != "embedding":
        assert not any(n.endswith(("embed_tokens.weight", "lm_head.weight")) for n in saved)
        rows = len(loaded.peft_config["default"].trainable_token_indices["model.embed_tokens"])
        assert all(t.shape == (rows, 64) for t in deltas.values())
    result = merge(tmp_path / "final", tmp_path / "merged")
    assert result.difference < (1e-5 if kind != "8_bit" else result.bound)
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    difference = (logits(merged, batch(tokenizer).ids_BT) - expected).abs().max()
    assert difference < (1e-5 if kind != "8_bit" else result.bound)
    assert (merged.lm_head.weight is merged.model.embed_tokens.weight) == tied
    assert AutoTokenizer.from_pretrained(tmp_path / "merged").convert_tokens_to_ids("<sql>") == new


def test_plain_peft_loads_it_onto_a_base_of_the_same_size(cache_dir: Path, tmp_path: Path) -> None:
    """The rows that fill up are trained and saved as well, so whatever another library puts there is
    replaced."""
    tiny = family(cache_dir, add_tokens=[f"<t{i}>" for i in range(60)], add_special_tokens=[])
    module = trained(Lora(rank=4), tiny, batch(tiny.tokenizer()))
    save_final(module, tiny.tokenizer(), tmp_path)
    base = AutoModelForCausalLM.from_pretrained(tiny.folder())
    base.resize_token_embeddings(len(AutoTokenizer.from_pretrained(tmp_path)), pad_to_multiple_of=16)
    text = torch.arange(2, 42)[None]
    theirs, ours = (
        m.eval()(input_ids=text).logits for m in (PeftModel.from_pretrained(base, tmp_path), module.model)
    )
    assert torch.equal(theirs, ours)


@pytest.mark.parametrize("tied", [True, False])
def test_loss_and_gradients_are_those_of_peft(tied: bool, cache_dir: Path) -> None:
    tiny = family(cache_dir, tied)
    model = trained(Lora(rank=4), tiny, batch(tiny.tokenizer()), steps=1).model
    data = batch(tiny.tokenizer())
    nll = TokenLoss(model, tiny, chunk_size=5)(*inputs(data))[0].sum()
    nll.backward()
    ours = {n: p.grad.clone() for n, p in model.named_parameters() if p.requires_grad}
    model.zero_grad()
    out = model(input_ids=data.ids_BT, use_cache=False).logits[0, :-1]
    theirs = torch.nn.functional.cross_entropy(out, data.ids_BT[0, 1:], reduction="sum")
    theirs.backward()
    assert abs(nll.item() - theirs.item()) < 1e-4
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            assert torch.allclose(
                ours[name], parameter.grad, atol=1e-5 * parameter.grad.abs().max().item()
            ), name
    tokens = [n for n in ours if "trainable_tokens_delta" in n]
    assert len(tokens) == (1 if tied else 2) and all(ours[n].abs().sum() > 0 for n in tokens)


def test_rows_are_float32_beside_a_bf16_base(cache_dir: Path, tmp_path: Path) -> None:
    tiny = family(cache_dir)
    model = Lora().attach(tiny.model(torch.bfloat16), tiny)
    assert {p.dtype for p in model.parameters() if p.requires_grad} == {torch.float32}
    save_final(TokenLoss(model, tiny), tiny.tokenizer(), tmp_path)
    note = json.loads((tmp_path / "mft.json").read_text())["origin"]
    assert note["dtype"] == "bfloat16" and note["tokens"] == ADDED | {"pad_to_multiple_of": 16}


def test_goes_on_from_an_adapter_with_the_same_tokens_only(cache_dir: Path, tmp_path: Path) -> None:
    tiny = family(cache_dir)
    first = trained(Lora(rank=4), tiny, batch(tiny.tokenizer()))
    save_final(first, tiny.tokenizer(), tmp_path)
    peft = Lora(path=str(tmp_path))
    again = peft.attach(tiny.model(torch.float32), tiny)
    ids_BT = batch(tiny.tokenizer()).ids_BT
    assert torch.equal(logits(again, ids_BT), logits(first.model, ids_BT))
    assert any("trainable_tokens_delta" in n and p.requires_grad for n, p in again.named_parameters())
    plain = Tiny(cache_dir=str(cache_dir))
    with pytest.raises(
        UserError, match=r"was trained with 3 new rows of the embedding, not with none: give the same"
    ):
        peft.attach(plain.model(torch.float32), plain)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"add_tokens": ["a b", ""]}, r"model\.add_tokens: '' is not a token"),
        ({"add_tokens": ["<x>"], "add_special_tokens": ["<x>"]}, r"name '<x>' more than once"),
        ({"pad_to_multiple_of": 0}, r"model\.pad_to_multiple_of=0 must be at least 1"),
    ],
)
def test_refused_before_loading(values: dict[str, object], message: str, cache_dir: Path) -> None:
    with pytest.raises(UserError, match=message):
        Tiny(cache_dir=str(cache_dir), **values).check()


def test_what_the_vocabulary_has_is_no_new_token(cache_dir: Path) -> None:
    with pytest.raises(
        UserError, match=r"model\.add_tokens: '<\|pad\|>' is in the vocabulary already, as 1; remove it"
    ):
        Tiny(cache_dir=str(cache_dir), add_tokens=["<|pad|>"]).tokenizer()


def test_a_head_with_a_bias_is_trained_whole() -> None:
    from transformers import AutoModelForCausalLM, PhiConfig

    from mft.model.special_tokens import NEW_ROWS, widen_embeddings

    config = PhiConfig(
        hidden_size=64, intermediate_size=64, num_hidden_layers=1, num_attention_heads=4, vocab_size=60
    )
    model = AutoModelForCausalLM.from_config(config)
    widen_embeddings(model, [60, 61], 8)
    assert getattr(model, NEW_ROWS) == [60, 61, 62, 63]
    head = model.get_output_embeddings()
    assert torch.allclose(head.bias[60:], head.bias[:60].mean().expand(4), atol=1e-6)
    with pytest.raises(UserError, match=r"not just a matrix.*modules_to_save=\[lm_head\]"):
        Lora().attach(model, CausalLM("unused"))
    whole = Lora(modules_to_save=["lm_head"]).attach(model, CausalLM("unused"))
    assert list(whole.peft_config["default"].trainable_token_indices) == ["model.embed_tokens"]


@pytest.mark.slow
@pytest.mark.parametrize("peft", ["lora", "full"])
def test_a_run_with_new_tokens_resumes_merges_and_answers(peft: str, tmp_path: Path, cache_dir: Path) -> None:
    settings = [f"peft={peft}", 'model.add_tokens=["what comes"]', 'model.add_special_tokens=["<|end|>"]']
    settings += ['model.eos_token="<|end|>"', "train.max_steps=4", "train.save_every=2", "optimizer.lr=1e-3"]
    _, run_dir = train(tmp_path, cache_dir, *settings)
    file = next((run_dir / "final").glob("*model.safetensors"))
    whole = load_file(file)
    assert resume(tmp_path, cache_dir, *settings, step=2)["status"] == "finished"
    again = load_file(file)
    assert whole.keys() == again.keys() and all(torch.equal(whole[name], again[name]) for name in whole)
    folder = run_dir
    if peft == "lora":
        folder = tmp_path / "merged"
        assert merge(run_dir / "final", folder).difference < 1e-5
    answerer = Answerer(folder, Encoder.saved)
    assert answerer.tokenizer.eos_token == "<|end|>" and "what comes" in answerer.tokenizer.get_vocab()
    one = answerer.answer(["adding 1: what comes next?"], do_sample=False, max_new_tokens=4)
    assert one == Answerer(run_dir, Encoder.saved).answer(
        ["adding 1: what comes next?"], do_sample=False, max_new_tokens=4
    )
    with pytest.raises(UserError, match="another config"):
        train(tmp_path, cache_dir, *[s for s in settings if "add_tokens" not in s])
