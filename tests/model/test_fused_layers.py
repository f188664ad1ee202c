"""Norms and gated MLPs as one function each: the numbers are those of transformers, and less is kept."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import LlamaConfig
from transformers.models.gemma.modeling_gemma import GemmaRMSNorm
from transformers.models.llama.modeling_llama import LlamaMLP, LlamaRMSNorm

from mft.model.causal_lm import CausalLM
from mft.model.fused_layers import FusedMlp, FusedNorm, GatedSilu, RootMeanSquare, described, fuse_layers
from mft.model.token_loss import TokenLoss
from tests.model.families import FAMILIES, tiny_model
from tests.model.rows import batch, inputs

ROWS = batch([[19, 3, 10], [24, 5]], 32, 320)


def both(module: nn.Module) -> tuple[nn.Module, nn.Module]:
    """A module as transformers computes it, and a fused copy."""
    fused = copy.deepcopy(module)
    fuse_layers(fused)
    return module, fused


def gradients(module: nn.Module, x: Tensor, dy: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    """Returns the output, and the gradients of input and weights."""
    x = x.clone().requires_grad_()
    y = module(x)
    y.backward(dy.to(y.dtype))
    assert x.grad is not None
    return y.detach(), {"x": x.grad} | {
        name: p.grad for name, p in module.named_parameters() if p.grad is not None
    }


def norm(dtype: torch.dtype = torch.float32) -> nn.Module:
    torch.manual_seed(0)
    module = LlamaRMSNorm(48, eps=1e-5)
    module.weight.data = 1 + torch.randn(48)
    return module.to(dtype)


def mlp(dtype: torch.dtype = torch.float32, act: str = "silu") -> nn.Module:
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=48, intermediate_size=80, num_attention_heads=4, hidden_act=act, mlp_bias=True
    )
    return LlamaMLP(config).to(dtype)


@pytest.mark.parametrize("function", ["norm", "mlp"])
def test_gradients_are_those_of_the_function_in_float64(function: str) -> None:
    torch.manual_seed(0)
    if function == "mlp":
        both = [torch.randn(3, 7, dtype=torch.float64, requires_grad=True) for _ in range(2)]
        assert torch.autograd.gradcheck(GatedSilu.apply, both)
        return
    # its statistics are float32, as in transformers: compared with the formula in float64
    x, w = (torch.randn(shape, requires_grad=True) for shape in ((5, 48), (48,)))
    dy = torch.randn(5, 48)
    found = torch.autograd.grad(RootMeanSquare.apply(x, w, 1e-5), (x, w), dy)
    wide_x, wide_w = (t.detach().double().requires_grad_() for t in (x, w))
    y = wide_w * wide_x * torch.rsqrt(wide_x.pow(2).mean(-1, keepdim=True) + 1e-5)
    for one, two in zip(found, torch.autograd.grad(y, (wide_x, wide_w), dy.double()), strict=True):
        assert torch.allclose(one.double(), two, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("shape", [(48,), (0, 48), (5, 48), (2, 5, 48), (2, 3, 5, 48)], ids=str)
@pytest.mark.parametrize("weights", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("x_dtype", [torch.float32, torch.bfloat16], ids=["x fp32", "x bf16"])
@pytest.mark.parametrize("make", [norm, mlp])
def test_a_layer_returns_the_same_bits_and_the_same_gradients(
    make: Any, shape: tuple[int, ...], weights: torch.dtype, x_dtype: torch.dtype
) -> None:
    plain, fused = both(make(weights))
    assert isinstance(fused, FusedNorm | FusedMlp) and type(fused).__name__ == type(plain).__name__
    torch.manual_seed(1)
    x, dy = torch.randn(shape).to(x_dtype), torch.randn(shape)
    with torch.autocast("cpu", torch.bfloat16, enabled=weights != x_dtype):
        expected, slow = gradients(plain, x, dy)
        found, fast = gradients(fused, x, dy)
    assert found.dtype == expected.dtype and torch.equal(found, expected)
    assert slow.keys() == fast.keys()
    exact = weights == x_dtype == torch.float32
    for name, gradient in slow.items():
        assert fast[name].dtype == gradient.dtype
        # bf16 keeps 8 bits, and both round between their steps, at other places
        bound = (1e-5 if exact else 2e-2) * max(
            1.0, float(gradient.float().abs().max() if gradient.numel() else 0)
        )
        assert torch.allclose(fast[name].float(), gradient.float(), rtol=0, atol=bound), name


def test_in_bf16_gradients_are_as_near_to_float32_as_before() -> None:
    torch.manual_seed(1)
    x, dy = torch.randn(64, 48), torch.randn(64, 48)
    for make in (norm, mlp):
        _, exact = gradients(make(), x, dy)
        plain, fused = both(make(torch.bfloat16))
        errors = []
        for module in (plain, fused):
            found = gradients(module, x.bfloat16(), dy)[1]["x"].float()
            errors.append(float((found - exact["x"]).norm()))
        assert errors[1] < 1.1 * errors[0], (make.__name__, errors)


def test_what_computes_otherwise_stays_as_it_is() -> None:
    class Mine(LlamaRMSNorm):
        """A subclass of one's own, though it adds nothing."""

    others = nn.ModuleList([GemmaRMSNorm(8), nn.RMSNorm(8), nn.LayerNorm(8), mlp(act="gelu"), Mine(8)])
    hooked = norm()
    hooked.forward = hooked.forward  # type: ignore[method-assign]  # replaced by somebody
    others.append(hooked)
    before = [type(module) for module in others]
    fuse_layers(others)
    assert [type(module) for module in others] == before and described(others) == ""


@pytest.mark.parametrize("name", FAMILIES)
def test_a_family_computes_the_same(name: str) -> None:
    """Losses to the bit, gradients within rounding, whatever of the family is fused; and a family of llama's kind
    is fused."""
    model = tiny_model(name).train()
    plain = TokenLoss(copy.deepcopy(model), CausalLM("mine", fused=False, attention="sdpa"))
    fused = TokenLoss(model, CausalLM("mine", attention="sdpa"))
    if name in ("llama", "mistral", "mixtral", "qwen2", "qwen3", "smollm", "granite", "deepseek_v3"):
        assert "norms" in described(fused)
    found = []
    for module in (plain, fused):
        nll_BT, router = module(*inputs(ROWS))
        (nll_BT.sum() + router).backward()
        found.append(
            (nll_BT.detach(), {n: p.grad for n, p in module.named_parameters() if p.grad is not None})
        )
    assert torch.equal(found[0][0], found[1][0])
    assert found[0][1].keys() == found[1][1].keys()
    for key, gradient in found[0][1].items():
        assert torch.allclose(
            found[1][1][key], gradient, rtol=1e-4, atol=1e-4 * float(gradient.abs().max())
        ), key


def test_less_is_kept_for_the_backward_pass() -> None:
    """Bytes of a token that autograd keeps in a layer: a float32 copy of each norm's input and the activated gate
    are gone."""
    kept = []
    for fused in (False, True):
        sizes: dict[int, tuple[int, Tensor]] = {}
        module = nn.ModuleDict({"norm": norm(torch.bfloat16), "mlp": mlp(torch.bfloat16)}).requires_grad_(
            False
        )
        if fused:
            fuse_layers(module)
        own = {p.data_ptr() for p in module.parameters()}

        def save(tensor: Tensor, own: set[int] = own, sizes: Any = sizes) -> Tensor:
            if tensor.data_ptr() not in own:
                sizes[tensor.data_ptr()] = (tensor.numel() * tensor.element_size(), tensor)
            return tensor

        x = torch.randn(100, 48, dtype=torch.bfloat16, requires_grad=True)
        with torch.autograd.graph.saved_tensors_hooks(save, lambda tensor: tensor):
            module["mlp"](module["norm"](x))
        kept.append(sum(size for size, _ in sizes.values()) / 100)
    # of frozen weights: float32 x and its scale, gate, up, act; then x, the scale, gate and up
    assert kept[0] - kept[1] == pytest.approx(2 * 48 + 2 * 80, abs=8), kept
