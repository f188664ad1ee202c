"""A linear layer and its adapter as one function: equal to peft's own path in exact arithmetic, as near to
the exact result as that in bf16, in less memory; and peft's own path wherever it is another computation."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft.tuners.lora import Linear
from torch import nn

from mft.model.causal_lm import CausalLM
from mft.model.peft.fused import LowRankLinear, described
from mft.model.peft.lora import Lora
from mft.model.peft.qlora import QLora
from mft.model.tiny import Tiny
from mft.model.token_loss import TokenLoss
from tests.model.rows import batch, inputs
from tests.model.steps import shaken
from tests.model.test_checkpointing import saved
from tests.model.test_residual_stream import Casts

ROWS = batch([[19, 3, 10], [24, 5]], 32, 256)
FAMILIES: dict[str, dict[str, Any]] = {
    "Llama": {},
    "Qwen2": {"num_key_value_heads": 2},  # q, k and v have a bias
    "GPTNeoX": {},  # all have one
    "Phi3": {},
}


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", [(6,), (2, 3), (2, 1, 3), (0,)])
def test_gradients_by_differences(shape: tuple[int, ...], bias: bool) -> None:
    torch.manual_seed(0)
    x = torch.randn(*shape, 5, dtype=torch.float64, requires_grad=True)
    w_OI, bias_O = torch.randn(4, 5).double(), torch.randn(4).double() if bias else None
    a_RI = torch.randn(2, 5, dtype=torch.float64, requires_grad=True)
    b_OR = torch.randn(4, 2, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(LowRankLinear.apply, (x, w_OI, bias_O, a_RI, b_OR, 0.7))
    expected = x @ (w_OI + 0.7 * b_OR @ a_RI).T + (0 if bias_O is None else bias_O)
    assert torch.allclose(LowRankLinear.apply(x, w_OI, bias_O, a_RI, b_OR, 0.7), expected, atol=1e-14)


def test_inputs_of_any_layout_and_results_that_are_changed_in_place() -> None:
    torch.manual_seed(0)
    x = torch.randn(5, 3, 2, dtype=torch.float64, requires_grad=True)
    rest = (torch.randn(4, 5).double(), None, torch.randn(2, 5).double(), torch.randn(4, 2).double(), 2.0)
    for view in (x.transpose(0, 2), x.movedim(0, -1)[:, :1].expand(3, 2, 5)):
        y = LowRankLinear.apply(view, *rest)
        assert torch.allclose(y, view @ (rest[0] + 2 * rest[3] @ rest[2]).T, atol=1e-14)
        y.clamp_(-1, 1).sum().backward()  # as some models do to queries and keys


def step(family: CausalLM, peft: Lora, dtype: torch.dtype, autocast: bool = False) -> dict[str, Any]:
    """Returns loss and gradients of a step, and how the adapters were computed. dtype: of the base."""
    model = adapted(family, peft, dtype)
    if dtype == torch.float64:
        model.double()
    family.checkpoint(model)
    module = TokenLoss(model, family)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        nll_BT, _ = module(*inputs(ROWS))
    nll_BT.sum().backward()
    trained = [p for p in model.parameters() if p.requires_grad]
    assert all(p.grad is not None and p.grad.dtype == p.dtype for p in trained)
    gradient = torch.cat([p.grad.flatten().double() for p in trained if p.grad is not None])
    return {"words": described(model), "loss": float(nll_BT.detach().sum()), "gradient": gradient}


def adapted(family: CausalLM, peft: Lora, dtype: torch.dtype) -> Any:
    """The model with adapters that are not zero, the same in each dtype."""
    model = shaken(peft.attach(family.model(dtype, peft.quantization(dtype)), family))
    torch.manual_seed(2)
    for name, parameter in model.named_parameters():
        if "lora_A" in name:
            nn.init.normal_(parameter, std=0.1)
    return model.train()


def distance(one: dict[str, Any], other: dict[str, Any]) -> float:
    return float((one["gradient"] - other["gradient"]).norm() / other["gradient"].norm())


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("name", FAMILIES)
def test_equals_the_path_of_peft(name: str, checkpointing: bool, tmp_path: Path) -> None:
    family = saved(name, tmp_path, 2, **FAMILIES[name])
    theirs = step(family, Lora(use_rslora=True, rank=6, fused=False), torch.float64)
    family.gradient_checkpointing = checkpointing
    ours = step(family, Lora(use_rslora=True, rank=6), torch.float64)
    assert ours["words"].startswith("fused in ") and "peft" not in ours["words"]
    assert theirs["words"].startswith("fused in 0 of ") and "peft.fused=false" in theirs["words"]
    assert ours["loss"] == pytest.approx(theirs["loss"], rel=1e-12)
    assert distance(ours, theirs) < 1e-12


@pytest.mark.parametrize("name", FAMILIES)
def test_is_as_near_to_the_exact_result_in_bf16(name: str, tmp_path: Path) -> None:
    family = saved(name, tmp_path, 2, **FAMILIES[name])
    exact = step(family, Lora(), torch.float64)
    theirs = step(family, Lora(fused=False), torch.bfloat16, autocast=True)
    ours = step(family, Lora(), torch.bfloat16, autocast=True)
    assert ours["loss"] == pytest.approx(exact["loss"], rel=1e-3)
    assert distance(ours, theirs) > 0 and distance(ours, exact) < 1.1 * distance(theirs, exact) < 0.05


# ── where peft's own path is taken ──


def two_adapters(model: Any) -> None:
    model.add_adapter("other", model.peft_config["default"])
    shaken(model)
    model.base_model.set_adapter(["default", "other"])


def hooked(model: Any) -> None:
    for layer in linear_layers(model):
        layer.lora_A["default"].register_forward_hook(lambda *_: None)


def replaced_forward(model: Any) -> None:
    for layer in linear_layers(model):
        layer.base_layer.forward = layer.base_layer.forward


def trained_base(model: Any) -> None:
    for layer in linear_layers(model):
        layer.base_layer.requires_grad_(True)


def untouched(model: Any) -> None:
    pass


def linear_layers(model: Any) -> list[Any]:
    return [module for module in model.modules() if isinstance(module, Linear)]


@pytest.mark.parametrize(
    ("peft", "change", "reason"),
    [
        (Lora(dropout=0.3), untouched, "dropout"),
        (Lora(use_dora=True), untouched, "DoRA"),
        (Lora(), two_adapters, "2 adapters"),
        (Lora(), hooked, "hooks of single modules"),
        (Lora(), replaced_forward, "hooks of single modules"),
        (Lora(), trained_base, "a trained base"),
        (QLora(), untouched, "quantised"),
        (QLora(bits=8), untouched, "quantised"),
    ],
)
def test_other_computations_are_those_of_peft_to_the_bit(
    peft: Lora, change: Callable[[Any], None], reason: str, tiny: Tiny
) -> None:
    results = []
    for fused in (True, False):
        peft.fused = fused
        model = adapted(tiny, peft, torch.float32)
        change(model)
        if fused:
            assert described(model) == f"fused in 0 of 14 layers, peft's own path in 14 ({reason})"
        torch.manual_seed(3)  # of the dropout
        nll_BT, _ = TokenLoss(model, tiny)(*inputs(ROWS))
        nll_BT.sum().backward()
        gradients = [p.grad for p in model.parameters() if p.grad is not None]
        results.append([nll_BT.detach(), *gradients])
    peft.fused = True
    assert len(results[0]) == len(results[1]) and all(map(torch.equal, *results))


def test_disabled_and_merged_adapters_and_another_dtype_than_autocasts(tiny: Tiny) -> None:
    model, plain = adapted(tiny, Lora(), torch.float32), tiny.model(torch.float32).train()
    with model.disable_adapter():
        assert torch.equal(model(ROWS.ids_BT).logits, plain(ROWS.ids_BT).logits)
    before = model(ROWS.ids_BT).logits
    model.merge_adapter()
    assert (model(ROWS.ids_BT).logits - before).abs().max() < 1e-5
    model.unmerge_adapter()
    model, theirs = (adapted(tiny, Lora(fused=fused), torch.float32) for fused in (True, False))
    with torch.autocast("cpu", torch.bfloat16):  # the base is float32: autocast casts it, once per step
        assert torch.equal(model(ROWS.ids_BT).logits, theirs(ROWS.ids_BT).logits)
    model, theirs = (adapted(tiny, Lora(fused=fused), torch.bfloat16) for fused in (True, False))
    assert torch.equal(model(ROWS.ids_BT).logits, theirs(ROWS.ids_BT).logits)  # without autocast


def test_shapes_without_storage(tiny: Tiny) -> None:
    model = adapted(tiny, Lora(), torch.float32).to("meta")
    assert model(ROWS.ids_BT.to("meta")).logits.shape[:2] == ROWS.ids_BT.shape


def test_an_adapter_of_an_embedding_and_of_experts_is_told(tiny: Tiny) -> None:
    untied = dataclasses.replace(tiny, tied=False).model(torch.float32)
    model = Lora(targets=["embed_tokens", "q_proj"]).attach(untied, tiny)
    assert described(model) == "fused in 2 of 3 layers, peft's own path in 1 (embedding)"
    assert described(tiny.model(torch.float32)) == ""


# ── what it saves ──


def trained_in_bf16(family: CausalLM, peft: Lora, change: Callable[[Any], None]) -> dict[str, Any]:
    """Four steps of AdamW under autocast; `kept` and `casts` are those of the first forward."""
    model = adapted(family, peft, torch.bfloat16)
    change(model)
    module = TokenLoss(model, family)
    optimizer = torch.optim.AdamW([p for p in module.parameters() if p.requires_grad], lr=1e-2)
    own = {tensor.untyped_storage().data_ptr() for tensor in (*module.parameters(), *module.buffers())}
    kept: dict[int, torch.Tensor] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        if (place := tensor.untyped_storage().data_ptr()) not in own:
            kept[place] = tensor  # alive, or its place is taken again
        return tensor

    found: dict[str, Any] = {"losses": []}
    for number in range(4):
        kept.clear()
        hooks = torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor)
        with torch.autocast("cpu", torch.bfloat16), hooks, Casts() as casts:
            nll_BT, _ = module(*inputs(ROWS))
        if number == 0:
            found["kept"] = sum(tensor.untyped_storage().nbytes() for tensor in kept.values())
            found["casts"] = casts.count
        nll_BT.sum().backward()
        optimizer.step()
        optimizer.zero_grad()
        found["losses"].append(float(nll_BT.detach().sum()))
    found["weights"] = torch.cat([p.detach().flatten() for p in module.parameters() if p.requires_grad])
    return found


def test_inputs_are_not_cast_to_what_autocast_takes_back(tiny: Tiny) -> None:
    """Also on peft's own path, which a hook demands here: the same to the bit over four steps."""
    ours = trained_in_bf16(tiny, Lora(), hooked)
    theirs = trained_in_bf16(tiny, Lora(fused=False), hooked)
    assert ours["losses"] == theirs["losses"] and torch.equal(ours["weights"], theirs["weights"])
    assert theirs["casts"] - ours["casts"] == 2 * 14  # there and back in each layer
    assert ours["kept"] < 0.9 * theirs["kept"]


def test_dropout_and_dora_are_given_float32(tiny: Tiny) -> None:
    """On a CPU dropout rounds its factor to the dtype of what it drops."""
    for peft in (Lora(dropout=0.1), Lora(use_dora=True)):
        results = []
        for fused in (True, False):
            peft.fused = fused
            torch.manual_seed(3)
            results.append(trained_in_bf16(tiny, peft, untouched))
        ours, theirs = results
        assert ours["losses"] == theirs["losses"] and torch.equal(ours["weights"], theirs["weights"])


def test_less_is_kept_for_the_backward_pass(tiny: Tiny) -> None:
    ours = trained_in_bf16(tiny, Lora(rank=4), untouched)
    theirs = trained_in_bf16(tiny, Lora(rank=4, fused=False), untouched)
    assert ours["losses"][0] == pytest.approx(theirs["losses"][0], rel=1e-3)
    assert ours["kept"] < 0.9 * theirs["kept"]  # of the whole model, its head included


def test_layers_that_read_the_same_keep_it_once() -> None:
    x = torch.randn(8, 64, requires_grad=True)
    kept: list[torch.Tensor] = []

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        kept.append(tensor)
        return tensor

    w_OI, a_RI, b_OR = torch.randn(32, 64), nn.Parameter(torch.randn(2, 64)), nn.Parameter(torch.randn(32, 2))
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        for _ in range(3):
            LowRankLinear.apply(x, w_OI, None, a_RI, b_OR, 2.0)
    places = {tensor.untyped_storage().data_ptr(): tensor.numel() for tensor in kept}
    given = {tensor.untyped_storage().data_ptr() for tensor in (x, w_OI, a_RI, b_OR)}
    assert given <= set(places)
    assert [size for place, size in places.items() if place not in given] == [8 * 2] * 3
