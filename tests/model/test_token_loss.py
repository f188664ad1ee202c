"""Token losses equal transformers' own, whatever the layout of rows, chunks and heads."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
import transformers

from mft.batch import IGNORE
from mft.model.causal_lm import CausalLM
from mft.model.cross_entropy import default_chunk_size
from mft.model.peft.full import Full
from mft.model.peft.lora import Lora
from mft.model.tiny import Tiny
from mft.model.token_loss import TokenLoss, trailing_positions
from tests.model.families import SIZES
from tests.model.rows import alone, batch, inputs
from tests.model.steps import shaken

V = 512


def gradients(module: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {n: p.grad.clone() for n, p in module.named_parameters() if p.grad is not None}


def assert_same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor], rtol: float) -> None:
    assert one.keys() == other.keys()
    for name in one:
        scale = other[name].abs().max().item()
        assert torch.allclose(one[name], other[name], rtol=0, atol=rtol * scale + 1e-12), name


def small(config_class: str, **values: object) -> torch.nn.Module:
    torch.manual_seed(0)
    config = getattr(transformers, config_class)(**(SIZES | {"vocab_size": V} | values))
    return transformers.AutoModelForCausalLM.from_config(config)


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize(
    "peft", [Full(), Lora(), Lora(targets=["q_proj", "lm_head"])], ids=["full", "lora", "lora_head"]
)
def test_equals_transformers(cache_dir: Path, tied: bool, peft: Full) -> None:
    if tied and getattr(peft, "targets", None):
        pytest.skip("an adapter on a tied head changes the embedding as well when merged; peft warns")
    family = Tiny(cache_dir=str(cache_dir), tied=tied)
    model = shaken(peft.attach(family.model(torch.float32), family))
    data = batch([[19], [24], [7]], 24, V)
    module = TokenLoss(model, family, chunk_size=5)
    nll_BT, router = module(*inputs(data))
    assert nll_BT.dtype == torch.float32 and router.item() == 0
    assert not nll_BT._is_view(), "FSDP2 warns of them"
    assert (nll_BT[data.target_BT == IGNORE] == 0).all()
    loss = nll_BT.sum() / (data.target_BT != IGNORE).sum()
    loss.backward()
    ours = gradients(model)
    model.zero_grad()

    labels = torch.full_like(data.ids_BT, IGNORE)  # transformers shifts by itself
    labels[:, 1:] = data.target_BT[:, :-1]
    theirs = model(input_ids=data.ids_BT, attention_mask=(data.sample_BT >= 0).long(), labels=labels).loss
    theirs.backward()
    assert abs(loss.item() - theirs.item()) < 1e-6
    assert_same(ours, gradients(model), 1e-5)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_packed_equals_padded_equals_alone(cache_dir: Path, attention: str) -> None:
    family = Tiny(cache_dir=str(cache_dir), attention=attention)
    model = family.model(torch.float32)
    module = TokenLoss(model, family)
    lengths = [9, 1, 14, 5, 20, 3]
    packed = batch([[9, 1, 14], [5, 20, 3]], 32, V)
    padded = batch([[n] for n in lengths], 20, V)
    single = alone(packed)
    assert all(torch.equal(a.ids_BT, b.ids_BT) for a, b in zip(single, alone(padded), strict=True))

    def run(data) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        model.zero_grad()
        parts = []
        for one in data:
            nll_BT, _ = module(*inputs(one))
            nll_BT.sum().backward()
            parts += [nll_BT[one.sample_BT == n] for n in range(int(one.sample_BT.max()) + 1)]
        return torch.cat(parts).detach(), gradients(model)

    reference, reference_gradients = run([one_numbered(one) for one in single])
    for data in (packed, padded):
        nll, grads = run([data])
        assert torch.allclose(nll, reference, atol=2e-6)
        assert_same(grads, reference_gradients, 1e-5)
    module.one_row = True  # what flash attention needs: the rows one after the other
    nll, grads = run([packed])
    assert torch.allclose(nll, reference, atol=2e-6)
    assert_same(grads, reference_gradients, 1e-5)


def one_numbered(data):
    data.sample_BT.zero_()
    return data


def test_padding_counts_on() -> None:
    sample_BT = torch.tensor([[0, 0, 1, -1, -1], [2, 2, 2, 2, 2], [-1, -1, -1, -1, -1]])
    position_BT = torch.tensor([[0, 1, 0, 0, 0], [0, 1, 2, 3, 4], [0, 0, 0, 0, 0]])
    expected = [[0, 1, 0, 1, 2], [0, 1, 2, 3, 4], [0, 1, 2, 3, 4]]
    assert trailing_positions(position_BT, sample_BT).tolist() == expected


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("trainable", [True, False])
def test_chunks_do_not_matter(tiny: Tiny, dtype: torch.dtype, trainable: bool) -> None:
    model = tiny.model(dtype)
    model.get_output_embeddings().weight.requires_grad_(trainable)
    data = batch([[30], [24]], 32, V)
    results = []
    for rows in (1, 7, 1000):
        model.zero_grad()
        nll_BT, _ = TokenLoss(model, tiny, chunk_size=rows)(*inputs(data))
        assert nll_BT.dtype == dtype
        (
            nll_BT * torch.linspace(0, 1, 32, dtype=dtype)
        ).sum().backward()  # a weight of its own for each token
        results.append((nll_BT.detach(), gradients(model)))
    assert ("model.embed_tokens.weight" in results[0][1]) == trainable
    tolerance = 1e-6 if dtype == torch.float32 else 1e-13
    for nll_BT, grads in results[1:]:
        assert torch.allclose(nll_BT, results[0][0], atol=tolerance * 10)
        assert_same(grads, results[0][1], tolerance * 10)


@pytest.mark.parametrize(
    ("vocabulary", "device", "trained", "positions"),
    [
        *((256, "cpu", True, 1024), (32_000, "cpu", True, 1024), (128_256, "cpu", True, 261)),
        *((256, "cpu", False, 1024), (32_000, "cpu", False, 262), (262_144, "cpu", False, 128)),
        *((32_000, "cuda", True, 8388), (128_256, "cuda", False, 2092), (2_000_000, "cuda", True, 256)),
    ],
)
def test_a_chunk_fits_the_device(vocabulary: int, device: str, trained: bool, positions: int) -> None:
    assert default_chunk_size(vocabulary, device, trained) == positions


@pytest.mark.parametrize("trainable", [True, False])
def test_gradient_in_float64(trainable: bool) -> None:
    from mft.model.cross_entropy import linear_nll

    torch.manual_seed(0)
    hidden = torch.randn(7, 5, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(11, 5, dtype=torch.float64, requires_grad=trainable)
    target = torch.randint(0, 11, (7,))
    assert torch.autograd.gradcheck(lambda h, w: linear_nll(h, w, target, 3), (hidden, weight))


@pytest.mark.parametrize(
    "peft", [Full(), Lora(), Lora(targets=["q_proj", "lm_head"])], ids=["full", "lora", "lora_head"]
)
@pytest.mark.parametrize("rows", [[[12]], [[]]], ids=["untrained", "padding_only"])
def test_no_target_gives_zero_gradients(cache_dir: Path, peft: Full, rows: list[list[int]]) -> None:
    family = Tiny(cache_dir=str(cache_dir), tied=False)
    model = peft.attach(family.model(torch.float32), family)
    data = batch(rows, 16, V, trained=0.0)
    nll_BT, router = TokenLoss(model, family)(*inputs(data))
    (nll_BT.sum() + router).backward()
    assert (nll_BT == 0).all()
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            assert parameter.grad is not None and (parameter.grad == 0).all(), name


@pytest.mark.parametrize("trainable", [True, False])
def test_bf16_autocast_stays_close(tiny: Tiny, trainable: bool) -> None:
    model = tiny.model(torch.float32)
    if not trainable:
        model.get_output_embeddings().weight.requires_grad_(False)
    data = batch([[30, 20], [44]], 64, V)
    module = TokenLoss(model, tiny, chunk_size=13)
    exact_BT, _ = module(*inputs(data))
    exact_BT.sum().backward()
    exact = gradients(model)
    model.zero_grad()
    with torch.autocast("cpu", torch.bfloat16):
        nll_BT, _ = module(*inputs(data))
    nll_BT.sum().backward()
    assert nll_BT.dtype == torch.float32
    assert torch.allclose(nll_BT, exact_BT, atol=0.03)
    for name, gradient in gradients(model).items():
        assert (gradient - exact[name]).norm() < 0.05 * exact[name].norm(), name


def test_logits_of_the_whole_batch_never_exist(tiny: Tiny) -> None:
    model = tiny.model(torch.float32)
    biggest = 0

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            nonlocal biggest
            out = func(*args, **(kwargs or {}))
            # [64, V] is the transposed weight
            if isinstance(out, torch.Tensor) and out.shape[-1:] == (V,) and out.shape[0] != 64:
                biggest = max(biggest, out.shape[0])
            return out

    data = batch([[60], [60]], 64, V, trained=1.0)
    for trainable in (True, False):
        model.get_output_embeddings().weight.requires_grad_(trainable)
        with Watch():
            TokenLoss(model, tiny, chunk_size=8)(*inputs(data))[0].sum().backward()
    assert biggest == 8


QUIRKS = {
    "gemma2": ("Gemma2Config", {"final_logit_softcapping": 2.0, "sliding_window": 8}),
    "granite": ("GraniteConfig", {"logits_scaling": 3.0}),
    "cohere": ("CohereConfig", {"logit_scale": 0.25}),
    "phi": ("PhiConfig", {"num_key_value_heads": 4}),  # a head with a bias
    "mixtral": ("MixtralConfig", {"num_local_experts": 4, "router_aux_loss_coef": 0.1}),
}


@pytest.mark.parametrize("name", QUIRKS)
@pytest.mark.parametrize("peft", [Full(), Lora()], ids=["full", "lora"])
def test_quirks_of_the_head(name: str, peft: Full) -> None:
    config, values = QUIRKS[name]
    family = CausalLM("unused")
    model = shaken(peft.attach(small(config, **values), family))
    data = batch([[19], [24]], 24, V)
    nll_BT, router = TokenLoss(model, family, chunk_size=5)(*inputs(data))
    loss = nll_BT.sum() / (data.target_BT != IGNORE).sum() + router
    loss.backward()
    ours = gradients(model)
    model.zero_grad()
    labels = torch.full_like(data.ids_BT, IGNORE)
    labels[:, 1:] = data.target_BT[:, :-1]
    extra = {"output_router_logits": True} if name == "mixtral" else {}
    theirs = model(
        input_ids=data.ids_BT,
        attention_mask=(data.sample_BT >= 0).long(),
        labels=labels,
        use_cache=False,
        **extra,
    ).loss
    theirs.backward()
    assert (router.item() > 0) == (name == "mixtral")
    assert abs(loss.item() - theirs.item()) < 2e-6
    assert_same(ours, gradients(model), 2e-5)


def test_router_loss_without_a_trained_token() -> None:
    model, family = small("MixtralConfig", num_local_experts=4, router_aux_loss_coef=0.1), CausalLM("unused")
    nll_BT, router = TokenLoss(model, family)(*inputs(batch([[]], 8, V)))
    (nll_BT.sum() + router).backward()
    assert router.item() == 0
    assert all((p.grad == 0).all() for p in model.parameters())
    assert TokenLoss(model, CausalLM("unused", router_coef=0.0)).router_coef == 0


def test_gradient_checkpointing_changes_nothing(cache_dir: Path) -> None:
    family = Tiny(cache_dir=str(cache_dir), gradient_checkpointing=True)
    for peft in (Full(), Lora()):
        model = shaken(peft.attach(family.model(torch.float32), family))
        data = batch([[9, 12], [20]], 24, V)
        found = []
        for on in (False, True):
            if on:
                assert family.checkpoint(model)
            model.zero_grad()
            TokenLoss(model, family)(*inputs(data))[0].sum().backward()
            found.append(gradients(model))
        assert_same(found[0], found[1], 1e-6)


def test_a_copy_is_not_shared(tiny: Tiny) -> None:
    """Engines copy and wrap the module; nothing of it may live outside its parameters."""
    module = TokenLoss(tiny.model(torch.float32), tiny)
    data = batch([[9]], 12, V)
    other = copy.deepcopy(module)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.zero_()
    assert module(*inputs(data))[0].sum() != other(*inputs(data))[0].sum()
