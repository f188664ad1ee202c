"""Which kernel attends in a packed row, and that each equals sdpa of every sample and transformers' masks.

No GPU was here: its facts are given, and its kernel is a stand-in that takes and refuses what the real one
does (`tests/model/varlen.py`)."""

from __future__ import annotations

from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import transformers
from torch import Tensor

from mft.model import fast_attention
from mft.model.attention import FAST, described
from mft.model.causal_lm import CausalLM
from mft.model.cpu_attention import BLOCK, LONGEST, causal_attention
from mft.model.fast_attention import BLOCKS, SDPA, VARLEN, Machine, fastest, kernel, repeats_keys, sdpa
from mft.model.packed_row import PackedRow, per_sample
from mft.model.token_loss import TokenLoss
from mft.model.torch_private import Varlen
from tests.model.rows import batch, inputs
from tests.model.test_attention import model_of
from tests.model.test_token_loss import assert_same, gradients
from tests.model.varlen import RELEASES, SEEN

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
GPU = Machine("cuda", (8, 0), Varlen(RELEASES["2.13"]))
CPU = Machine("cpu", native_bf16=True)


@pytest.mark.parametrize(
    ("machine", "dtype", "widths", "longest", "window", "expected"),
    [
        (GPU, BF16, (64, 64), 10, None, VARLEN),
        (GPU, FP16, (256, 256), 10, 4, VARLEN),
        (GPU, FP32, (64, 64), 10, None, SDPA),
        (GPU, BF16, (264, 264), 10, None, SDPA),
        (GPU, BF16, (60, 60), 10, None, SDPA),
        (GPU, BF16, (192, 128), 10, None, SDPA),  # deepseek: values narrower than keys
        (GPU._replace(capability=(7, 5)), FP16, (64, 64), 10, None, SDPA),
        (GPU._replace(varlen=None), BF16, (64, 64), 10, None, SDPA),  # torch before 2.10
        (GPU._replace(varlen=Varlen(RELEASES["2.10"])), BF16, (64, 64), 10, None, VARLEN),
        (GPU._replace(varlen=Varlen(RELEASES["2.10"])), BF16, (64, 64), 10, 10, VARLEN),
        (GPU._replace(varlen=Varlen(RELEASES["2.10"])), BF16, (64, 64), 10, 9, SDPA),
        (Machine("cuda"), BF16, (64, 64), 10, None, SDPA),  # an AMD GPU
        (Machine("mps"), BF16, (64, 64), 10, None, SDPA),
        (CPU, BF16, (60, 30), LONGEST, None, BLOCKS),
        (CPU, BF16, (64, 64), LONGEST, LONGEST, BLOCKS),
        (CPU, BF16, (64, 64), 10, 4, SDPA),
        (CPU, BF16, (64, 64), LONGEST + 1, None, SDPA),
        (CPU, FP32, (64, 64), 10, None, SDPA),
        (CPU._replace(native_bf16=False), BF16, (64, 64), 10, None, SDPA),
    ],
)
def test_choice(
    machine: Machine,
    dtype: torch.dtype,
    widths: tuple[int, int],
    longest: int,
    window: int | None,
    expected: str,
) -> None:
    assert kernel(machine, dtype, widths, longest, window) == expected


def test_what_this_machine_is_said_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    base = model_of("llama")
    TokenLoss(base, CausalLM("unused"))
    cpu = torch.device("cpu")
    assert described(base, cpu, FP32) == "sdpa, sample by sample"
    monkeypatch.setattr(fast_attention, "machine", lambda device: GPU)
    assert described(base, cpu, BF16) == "torch's varlen_attn, all samples of a row at once"


def test_a_model_whose_parts_have_a_config_each_is_not_said_to_have_the_kernel(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """BLT: no one width of a head; which kernel attends is decided call by call."""
    base: Any = SimpleNamespace(config=transformers.BltConfig(attn_implementation=FAST))
    monkeypatch.setattr(fast_attention, "machine", lambda device: GPU)
    assert described(base, torch.device("cpu"), BF16) == "sdpa, sample by sample"


def test_every_kernel_of_a_model_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    """Gemma 4: its config has the text model's inside, and layers without a window have wider heads."""
    text = {"hidden_size": 32, "intermediate_size": 32, "num_attention_heads": 2, "num_key_value_heads": 1}
    text |= {"num_hidden_layers": 2, "layer_types": ["sliding_attention", "full_attention"]}
    text |= {"head_dim": 16, "global_head_dim": 264, "num_kv_shared_layers": 0, "vocab_size": 320}
    text |= {"vocab_size_per_layer_input": 320, "hidden_size_per_layer_input": 8}
    vision = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = transformers.Gemma4Config(text_config=text, vision_config=vision, audio_config=None)
    base = transformers.AutoModelForCausalLM.from_config(config)
    assert TokenLoss(base, CausalLM("unused")).per_sample
    cpu = torch.device("cpu")
    assert described(base, cpu, FP32) == "sdpa, sample by sample"
    monkeypatch.setattr(fast_attention, "machine", lambda device: GPU)
    varlen = "torch's varlen_attn, all samples of a row at once"
    assert described(base, cpu, BF16) == f"{varlen}; sdpa, sample by sample"


@pytest.fixture
def on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A GPU whose kernel computes in every dtype, so that its results can be compared in float32."""
    monkeypatch.setattr(fast_attention, "machine", lambda device: GPU)
    monkeypatch.setattr(fast_attention, "kernel", lambda machine, dtype, *rest: kernel(machine, BF16, *rest))
    SEEN.clear()
    yield
    SEEN.clear()


@pytest.mark.usefixtures("on_a_gpu")
@pytest.mark.parametrize("name", ["llama", "mistral", "window_by_layer", "chunks"])
def test_varlen_equals_the_masked_forms_of_transformers(name: str) -> None:
    """Losses and gradients of packed rows to each sample in a row of its own with transformers' mask and to
    its block mask; grouped keys, sliding windows and chunks among them."""
    model = model_of(name)
    module = TokenLoss(model, CausalLM("unused"))
    packed, padded = (
        batch([[9, 1, 14], [5, 20, 3]], 32, 320),
        batch([[9], [1], [14], [5], [20], [3]], 20, 320),
    )
    found = []
    for by_sample, data in [(True, packed), (False, padded), (False, packed)]:
        module.per_sample = module.one_row = by_sample
        model.zero_grad()
        nll_BT, _ = module(*inputs(data))
        nll_BT.sum().backward()
        found.append((nll_BT[data.sample_BT >= 0].detach(), gradients(model)))
    assert len(SEEN) == model.config.num_hidden_layers
    for losses, slopes in found[1:]:
        assert torch.allclose(found[0][0], losses, atol=2e-6)
        assert_same(found[0][1], slopes, 1e-5)


@pytest.mark.usefixtures("on_a_gpu")
def test_borders_are_made_once_for_all_layers() -> None:
    model = model_of("chunks")
    TokenLoss(model, CausalLM("unused"))(*inputs(batch([[9, 1, 14]], 24, 320)))
    borders = {call["cu_seq_q"].data_ptr() for call in SEEN}
    assert len(SEEN) == model.config.num_hidden_layers and len(borders) == 1
    assert SEEN[0]["cu_seq_q"].diff().tolist() == [4, 4, 1, 1, 4, 4, 4, 2] and SEEN[0]["max_q"] == 4


def row_of(lengths: list[int], heads: int, key_heads: int, dtype: torch.dtype) -> list[Tensor]:
    """query, key and value, [1, heads, T, width], as views of [1, T, heads, width] as models have them."""
    torch.manual_seed(0)
    shape = (1, sum(lengths))
    counts = (heads, key_heads, key_heads)
    made = (torch.randn(*shape, count, 16, dtype=dtype).transpose(1, 2) for count in counts)
    return [tensor.requires_grad_() for tensor in made]


def module_of(heads: int, key_heads: int) -> SimpleNamespace:
    groups = {"num_key_value_groups": heads // key_heads}
    return SimpleNamespace(config=SimpleNamespace(), layer_idx=0, is_causal=True, **groups)


def test_varlen_under_autocast_gets_one_dtype(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rotary positions leave queries and keys in float32 beside values in bf16, and the kernel has no rule of
    autocast. With the real choice: float32 alone is not for it."""
    monkeypatch.setattr(fast_attention, "machine", lambda device: GPU)
    lengths = [3, 9, 1]
    query, key, value = row_of(lengths, 4, 2, FP32)
    row = {"packed_row": PackedRow.of(lengths, query.device), "scaling": 0.3}
    SEEN.clear()
    plain = fastest(module_of(4, 2), query, key, value, None, **row)[0]
    assert not SEEN
    with torch.autocast("cpu", dtype=BF16):
        mixed = fastest(module_of(4, 2), query, key, value.to(BF16), None, **row)[0]
    assert len(SEEN) == 1 and mixed.dtype == SEEN[0]["query"].dtype == BF16
    assert torch.allclose(mixed.float(), plain, atol=2e-2)
    mixed.sum().backward()
    assert query.grad is not None and query.grad.dtype == FP32


@pytest.mark.usefixtures("on_a_gpu")
@pytest.mark.parametrize(
    "asked", [{"dropout": 0.1}, {"is_causal": False}, {"position_bias": torch.zeros(1, 2, 1, 1)}]
)
def test_what_only_sdpa_computes_is_left_to_it(asked: dict[str, object]) -> None:
    query, key, value = row_of([5], 2, 2, FP32)
    row = {"packed_row": PackedRow.of([5], query.device)}
    fastest(module_of(2, 2), query, key, value, None, **row, **asked)
    assert not SEEN


@pytest.mark.parametrize("lengths", [[1], [BLOCK], [5, 2 * BLOCK + 7, 1, BLOCK, 3], [900]])
@pytest.mark.parametrize(("heads", "key_heads"), [(4, 4), (6, 2)])
def test_blocks_equal_sdpa(lengths: list[int], heads: int, key_heads: int) -> None:
    """Both are held against float64: in float32 within its rounding; in bf16 the blocks may be twice as far
    away as sdpa, which rounds the gradient of the scores less often."""
    alone = per_sample(sdpa)
    for dtype in (FP32, BF16):
        tensors = row_of(lengths, heads, key_heads, dtype)
        exact = [tensor.detach().double().requires_grad_() for tensor in tensors]
        module, row = module_of(heads, key_heads), PackedRow.of(lengths, torch.device("cpu"))
        wanted = torch.randn(1, sum(lengths), heads, 16, dtype=dtype)
        ours, theirs = (
            causal_attention(*tensors, lengths),
            alone(module, *tensors, None, packed_row=row)[0],
        )
        truth = alone(module, *exact, None, packed_row=row)[0]
        assert ours.shape == theirs.shape and ours.dtype == theirs.dtype and ours.is_contiguous()
        mine, other = ([out, *torch.autograd.grad(out, tensors, wanted)] for out in (ours, theirs))
        for a, b, c in zip(
            mine, other, [truth, *torch.autograd.grad(truth, exact, wanted.double())], strict=True
        ):
            size = c.norm().clamp(min=1e-3)  # query and key of a sample of one token have no gradient
            error, usual = ((found.double() - c).norm() / size for found in (a, b))
            assert error <= (1e-6 if dtype == FP32 else 2 * usual + 1e-3)


def test_blocks_round_no_query_by_its_scale() -> None:
    """A scale that is no power of two, as that of heads of 80 or 96: in bf16 as close to float64 as sdpa."""
    lengths, scale = [200, 130], 0.3
    tensors = [4 * tensor.detach() for tensor in row_of(lengths, 6, 2, BF16)]  # scores that differ
    row = {"packed_row": PackedRow.of(lengths, torch.device("cpu")), "scaling": scale}
    truth = per_sample(sdpa)(module_of(6, 2), *(t.double() for t in tensors), None, **row)[0]
    theirs = per_sample(sdpa)(module_of(6, 2), *tensors, None, **row)[0]
    ours = causal_attention(*tensors, lengths, scale)
    error, usual = (float((found.double() - truth).norm()) for found in (ours, theirs))
    assert error < 1.5 * usual


def test_blocks_keep_query_key_and_value_alone() -> None:
    tensors = row_of([70, 9], 6, 2, BF16)
    kept: list[int] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.numel()) or t, lambda t: t):
        causal_attention(*tensors, [70, 9])
    assert sum(kept) == sum(tensor.numel() for tensor in tensors)


def test_a_step_in_bf16_takes_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Under autocast and gradient checkpointing; losses as by sdpa."""
    monkeypatch.setattr(fast_attention, "machine", lambda device: CPU)
    model, data = model_of("llama"), batch([[9, 1, 14], [5, 20, 3]], 32, 320)
    model.gradient_checkpointing_enable({"use_reentrant": False})
    module = TokenLoss(model.train(), CausalLM("unused"))
    assert model.config._attn_implementation == FAST
    calls = []
    monkeypatch.setattr(
        fast_attention.cpu_attention,
        "causal_attention",
        lambda *given: calls.append(given) or causal_attention(*given),
    )
    found = []
    for here in (CPU, Machine("cpu")):
        monkeypatch.setattr(fast_attention, "machine", lambda device, here=here: here)
        model.zero_grad()
        with torch.autocast("cpu", dtype=BF16):
            nll_BT = module(*inputs(data))[0]
        nll_BT.sum().backward()
        found.append((nll_BT.detach(), gradients(model)))
    assert len(calls) == 2 * model.config.num_hidden_layers  # once more in backward
    assert torch.allclose(found[0][0], found[1][0], atol=3e-2)
    for name, gradient in found[0][1].items():
        one, other = gradient.flatten().double(), found[1][1][name].flatten().double()
        assert F.cosine_similarity(one, other, dim=0) > 0.999, name


def test_keys_are_repeated_where_cuda_has_no_kernel_for_fewer() -> None:
    assert repeats_keys("cuda", FP32, 9, 3)
    assert not repeats_keys("cuda", FP32, 9, 9) and not repeats_keys("cuda", BF16, 9, 3)
    assert not repeats_keys("cpu", FP32, 9, 3)


def test_repeated_keys_equal_grouped_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    query, key, value = row_of([7], 6, 2, FP32)
    seen = torch.ones(1, 1, 7, 7, dtype=torch.bool).tril().triu(-2)
    grouped = [sdpa(module_of(6, 2), query, key, value, mask)[0] for mask in (None, seen)]
    monkeypatch.setattr(fast_attention, "repeats_keys", lambda *facts: True)
    asked: list[int] = []
    real = F.scaled_dot_product_attention

    def watch(q: Tensor, k: Tensor, v: Tensor, **rest: object) -> Tensor:
        asked.append(k.shape[1])
        assert not rest.get("enable_gqa")
        return real(q, k, v, **rest)

    monkeypatch.setattr(F, "scaled_dot_product_attention", watch)
    repeated = [sdpa(module_of(6, 2), query, key, value, mask)[0] for mask in (None, seen)]
    assert asked == [6, 6]
    for one, other in zip(grouped, repeated, strict=True):
        assert torch.allclose(one, other, atol=1e-6)
