"""Adapters of mixtures of experts: the fused weights of the experts and the router, reached only when
asked."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file

from mft.errors import UserError
from mft.model.export import save_final
from mft.model.merge import merge
from mft.model.peft.lora import Lora
from mft.model.peft.qlora import QLora
from mft.model.peft.summary import audit, notes
from mft.model.token_loss import TokenLoss
from tests.model.mixtures import MIXTURES, family_of, mixture, mixture_folder
from tests.model.rows import batch, inputs
from tests.model.steps import logits, shaken
from tests.tiny_runs import resume, train

pytestmark = pytest.mark.filterwarnings("error::RuntimeWarning:peft")

IDS = torch.arange(2, 42)[None]
DATA = batch([[20, 9], [30]], 32, 512)


def loss(model: torch.nn.Module, name: str) -> torch.Tensor:
    nll_BT, router = TokenLoss(model, family_of(name))(*inputs(DATA))
    return nll_BT.sum() + router


def adapted(model: torch.nn.Module) -> set[str]:
    return {row.kind.split("*.")[-1] for row in audit(model) if row.trainable}


@pytest.mark.parametrize("name", MIXTURES)
def test_gradients_reach_the_experts_and_the_folder_loads_with_peft(name: str, tmp_path: Path) -> None:
    family = family_of(name)
    model = shaken(Lora(rank=4, experts=True).attach(mixture(name), family))
    block = "feed_forward" if name == "llama4" else "mlp"
    experts = {f"{block}.experts.gate_up_proj", f"{block}.experts.down_proj"}
    assert adapted(model) == {f"self_attn.{leaf}" for leaf in family.lora_targets} | experts
    loss(model, name).backward()
    for path, parameter in model.named_parameters():
        if parameter.requires_grad:
            assert parameter.grad is not None and parameter.grad.abs().sum() > 0, path
        else:
            assert parameter.grad is None, path
    expected = logits(model, IDS)
    model.save_pretrained(tmp_path, save_embedding_layers=False)
    assert torch.equal(logits(PeftModel.from_pretrained(mixture(name), tmp_path), IDS), expected)
    merged = PeftModel.from_pretrained(mixture(name), tmp_path).merge_and_unload()
    assert (
        (logits(merged, IDS) - expected).abs().max()
        < 1e-5
        < (logits(mixture(name), IDS) - expected).abs().max()
    )


@pytest.mark.parametrize("name", MIXTURES)
def test_all_linear_leaves_experts_and_router_and_asking_takes_them(name: str) -> None:
    family = family_of(name)
    every = adapted(Lora(rank=2, targets="all-linear").attach(mixture(name), family))
    assert not any(".experts." in kind or kind.endswith((".gate", "router", "expert_gate")) for kind in every)
    assert any("shared_expert" in kind for kind in every) == (
        name in ("qwen2_moe", "deepseek_v2", "deepseek_v3", "llama4")
    )
    more = adapted(
        Lora(rank=2, targets="all-linear", experts=True, router=True).attach(mixture(name), family)
    )
    routers = {kind for kind in more - every if ".experts." not in kind}
    block = "feed_forward" if name == "llama4" else "mlp"
    named = {"gpt_oss": ["router"], "llama4": ["router"], "qwen2_moe": ["gate", "shared_expert_gate"]}
    assert routers == {f"{block}.{leaf}" for leaf in named.get(name, ["gate"])}
    assert len(more - every) == len(routers) + 2


def test_experts_and_router_can_be_named() -> None:
    family = family_of("qwen3_moe")
    model = Lora(targets=["q_proj", "experts.down_proj", "gate"]).attach(mixture("qwen3_moe"), family)
    assert adapted(model) == {"self_attn.q_proj", "mlp.experts.down_proj", "mlp.gate"}
    model = Lora(targets=r".*\.1\.mlp\.experts\..*").attach(mixture("qwen3_moe"), family)
    by_kind = {row.kind: row for row in audit(model)}
    assert by_kind["model.layers.*.mlp.experts.gate_up_proj"].adapted == 1
    with pytest.raises(
        UserError, match=r"'w1' matches no module; this model has embed_tokens, .*gate_up_proj"
    ):
        Lora(targets=["w1"]).attach(mixture("mixtral"), family_of("mixtral"))


@pytest.mark.parametrize(
    ("peft", "message"),
    [
        (
            Lora(experts=True, dropout=0.1),
            r"peft\.dropout=0\.1 cannot be combined with peft\.experts=true.*dropout=0",
        ),
        (Lora(router=True, use_dora=True), r"peft\.use_dora=true cannot be combined with peft\.router=true"),
        (
            Lora(experts=True, init="pissa"),
            r"peft\.init=pissa cannot be combined .* bare weight; choose peft\.init=true",
        ),
        (QLora(experts=True, dropout=0.1), r"peft\.dropout=0\.1 cannot be combined with peft\.experts=true"),
    ],
)
def test_what_experts_cannot_have_is_refused_before_loading(peft: Lora, message: str) -> None:
    with pytest.raises(UserError, match=message):
        peft.check()


def test_what_only_the_model_can_tell_is_refused_at_loading(tiny) -> None:
    with pytest.raises(
        UserError, match=r"dropout=0\.1 cannot be combined with an adapter of model.layers.0.mlp.experts"
    ):
        Lora(targets=["experts.down_proj"], dropout=0.1).attach(mixture("mixtral"), family_of("mixtral"))
    with pytest.raises(UserError, match=r"peft\.experts=true: this model is not a mixture of experts"):
        Lora(experts=True).attach(tiny.model(torch.float32), tiny)


@pytest.mark.parametrize("name", ["qwen3_moe", "mixtral"])
def test_checkpointing_gives_the_same_gradients(name: str) -> None:
    family = family_of(name)
    found = []
    for on in (False, True):
        model = shaken(Lora(rank=4, experts=True).attach(mixture(name), family))
        family.gradient_checkpointing = on
        assert family.checkpoint(model) == on
        loss(model, name).backward()
        found.append({n: p.grad for n, p in model.named_parameters() if p.requires_grad})
    for path, gradient in found[0].items():
        assert torch.allclose(gradient, found[1][path], rtol=0, atol=1e-6 * gradient.abs().max().item()), path


@pytest.mark.parametrize("name", ["qwen3_moe", "mixtral"])
def test_experts_beside_4_bits(name: str, tokenizer, tmp_path: Path) -> None:
    family = family_of(name)
    family.path = str(mixture_folder(name, tmp_path / "base", tokenizer))
    peft = QLora(rank=4, experts=True)
    model = shaken(peft.attach(family.model(torch.float32, peft.quantization(torch.float32)), family))
    rows = {row.kind: row for row in audit(model)}
    experts = [row for row in rows.values() if row.role == "experts"]
    assert all(row.adapted == row.total and not row.packed for row in experts)
    assert rows["model.layers.*.self_attn.q_proj"].packed
    whole, size = sum(row.bytes for row in rows.values()), sum(row.bytes for row in experts)
    gib = f"{size / 2**30:.4g} of {whole / 2**30:.4g} GiB"
    said = f"experts are not quantised (bitsandbytes quantises linear layers only): they take {gib}"
    assert said in notes(list(rows.values()))
    assert size > sum(row.parameters - row.trainable for row in experts) * 4  # float32, and the adapters
    module = TokenLoss(model, family)
    module(*inputs(DATA))[0].sum().backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in model.parameters() if p.requires_grad)
    save_final(module, tokenizer, tmp_path / "adapter")
    again = PeftModel.from_pretrained(
        family.model(torch.float32, peft.quantization(torch.float32)), tmp_path / "adapter"
    )
    assert torch.equal(logits(again, IDS), logits(model, IDS))
    assert merge(tmp_path / "adapter", tmp_path / "merged").difference < 1e-5


def test_shared_experts_of_deepseek_in_4_bits(
    tokenizer, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """peft takes gate_proj for the routed experts there, and cannot adapt a packed weight by its name."""
    family = family_of("deepseek_v3")
    family.path = str(mixture_folder("deepseek_v3", tmp_path / "base", tokenizer))
    peft = QLora(targets="all-linear")
    with caplog.at_level(logging.WARNING):
        model = peft.attach(family.model(torch.float32, peft.quantization(torch.float32)), family)
    assert "down_proj, gate_proj, up_proj stay frozen" in caplog.text
    assert not any("shared" in kind for kind in adapted(model))
    peft = QLora(targets=["gate_proj"])
    with pytest.raises(
        UserError, match=r"gate_proj is quantised, .*keep it unquantised with peft\.skip_modules"
    ):
        peft.attach(family.model(torch.float32, peft.quantization(torch.float32)), family)
    peft = QLora(targets=["shared_experts.gate_proj"], skip_modules=["shared_experts"])
    model = peft.attach(family.model(torch.float32, peft.quantization(torch.float32)), family)
    assert adapted(model) == {"mlp.shared_experts.gate_proj"}


@pytest.mark.slow
@pytest.mark.parametrize(("name", "peft"), [("qwen3_moe", "lora"), ("mixtral", "qlora")])
def test_a_run_with_experts_resumes_to_the_bit_and_merges(
    name: str, peft: str, tokenizer, tmp_path: Path, cache_dir: Path
) -> None:
    base = mixture_folder(name, tmp_path / "base", tokenizer)
    settings = [
        f"model={name}",
        f"model.path={base}",
        "model.eos_token=null",
        f"peft={peft}",
        "peft.experts=true",
    ]
    settings += ["train.max_steps=4", "train.save_every=2", "optimizer.lr=1e-3", "peft.rank=4"]
    _, run_dir = train(tmp_path, cache_dir, *settings)
    whole = load_file(run_dir / "final" / "adapter_model.safetensors")
    assert resume(tmp_path, cache_dir, *settings, step=2)["status"] == "finished"
    again = load_file(run_dir / "final" / "adapter_model.safetensors")
    assert whole.keys() == again.keys() and any(".experts." in key for key in whole)
    assert all(torch.equal(whole[key], again[key]) for key in whole)
    assert "experts: 4 of 4 adapted" in (run_dir / "report" / "trained.json").read_text()
    assert merge(run_dir / "final", tmp_path / "merged").difference < 1e-5
