"""Single forwards and backwards of small models: layouts of the same samples (A3), kernels of attention (A4)."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
import transformers
from torch import Tensor

from mft.batch import Batch
from mft.distributed.ddp import Single
from mft.model.attention import EAGER, FAST, SDPA
from mft.model.causal_lm import CausalLM
from mft.model.introspect import base_of
from mft.model.token_loss import TokenLoss
from mft.model.torch_private import Varlen, varlen
from tests.gpu.children import Cell, Found, Place
from tests.model import varlen as stand_in
from tests.model.rows import alone, batch

V = 1024
ROWS = [[400, 1, 37, 210, 5, 88, 64, 3, 120, 17, 29, 250, 11, 9], [2, 377, 150], [], [399, 1, 60, 81]]
"""Samples of each row: one of a single token, and a row that is all padding."""

EXACT = {"loss": 1e-5, "token": 1e-5, "gradient": 1e-4}
HALF = {"loss": 1e-3, "token": 4e-2, "gradient": 2e-2}
"""Bounds of the difference of the mean loss, the largest one of a token's (a logit between 4 and 8 has steps of
0.03 in bf16), and the relative one of the gradient, which at 2e-2 has a cosine above 0.9998."""


@dataclass(frozen=True)
class Shape:
    """A model of two layers and the samples of its row."""

    heads: int = 8
    kv_heads: int = 4
    width: int = 32
    """Of a head."""
    kind: str = "Llama"
    """Mistral has a window of 64 keys, Llama4Text chunks of 128 of them."""
    lengths: tuple[int, ...] = tuple(ROWS[0])
    trained: float = 0.6
    """Share of tokens with a loss."""
    names: tuple[str, ...] = (FAST, EAGER, "block mask")
    """What is held beside sdpa sample by sample."""

    def model(self) -> Any:
        """Returns the model, in float32."""
        torch.manual_seed(0)
        config: dict[str, Any] = {
            "hidden_size": 256,
            "intermediate_size": 704,
            "num_hidden_layers": 2,
            "vocab_size": V,
            "num_attention_heads": self.heads,
            "num_key_value_heads": self.kv_heads,
            "head_dim": self.width,
        }
        if self.kind == "Mistral":
            config["sliding_window"] = 64
        if self.kind == "Llama4Text":
            config |= {"attention_chunk_size": 128, "attn_temperature_tuning": False, "num_local_experts": 2}
            config |= {"intermediate_size_mlp": 704, "pad_token_id": None}
        made = getattr(transformers, f"{self.kind}Config")(**config)
        kind = getattr(transformers, f"{self.kind.removesuffix('Text')}ForCausalLM")
        return kind._from_config(made, attn_implementation="sdpa")


@dataclass
class Pass:
    """Losses and the whole gradient of some batches."""

    nll: list[Tensor] = field(default_factory=list)
    gradient: Tensor = field(default_factory=lambda: torch.zeros(0))

    def apart(self, other: Pass) -> dict[str, float]:
        """Returns how far another pass over the same samples is from this one."""
        one, two = torch.cat(self.nll), torch.cat(other.nll)
        size = float(self.gradient.norm())
        return {
            "loss": float(abs(one.double().mean() - two.double().mean())),
            "token": float((one - two).abs().max()),
            "gradient": float((self.gradient - other.gradient).norm()) / size if size else 0.0,
        }


def shorter(lengths: Sequence[int], place: Place) -> list[int]:
    """Returns the lengths of samples, an eighth of them in a CPU twin."""
    return [max(1, n // 8) for n in lengths] if place.small else list(lengths)


def by_sample(nll_BT: Tensor, data: Batch) -> list[Tensor]:
    """Returns the losses of each sample, in the order of samples."""
    return [nll_BT[data.sample_BT == n].cpu() for n in range(int(data.sample_BT.max()) + 1)]


def passed(engine: Any, module: Any, batches: list[Batch]) -> Pass:
    """Returns the losses and the gradient of their sum."""
    found = Pass()
    module.zero_grad()
    for data in batches:
        there = data.to(engine.device)
        nll_BT, router = module(there)
        engine.backward(nll_BT.sum() + router)
        found.nll += by_sample(nll_BT.detach().float(), there)
    gradients = [p.grad for p in module.parameters() if p.grad is not None]
    found.gradient = torch.cat([g.detach().double().flatten().cpu() for g in gradients])
    return found


def prepared(model: Any, precision: str) -> tuple[Any, Any]:
    """Returns a single process's engine and a model's prepared module."""
    engine = Single().start(precision)
    module = TokenLoss(model.train(), CausalLM("unused"))
    return engine, engine.prepare(module, torch.optim.SGD(module.parameters(), lr=0.0))[0]


def layouts(precision: str, place: Place) -> Found:
    """Packed rows, padded ones and each sample alone have the same losses and gradient."""
    engine, module = prepared(Shape().model(), precision)
    rows = [shorter(row, place) for row in ROWS]
    packed = batch(rows, max(map(sum, rows)) + 36, V)
    each = alone(packed)
    padded = Batch(
        *(joined(each, name) for name in ("ids_BT", "target_BT", "task_BT", "sample_BT", "position_BT"))
    )
    one = passed(engine, module, [packed])
    found = Found()
    for name, batches in {"padded": [padded], "alone": each}.items():
        values = one.apart(passed(engine, module, batches))
        found.values |= {f"{name} {key}": value for key, value in values.items()}
        found.below(EXACT if precision == "fp32" else HALF, f"{name} ")
    return found


def joined(each: list[Batch], name: str) -> Tensor:
    """Returns a tensor of batches of one sample as one padded batch of them."""
    rows = [getattr(one, name)[0] for one in each]
    if name == "sample_BT":
        rows = [torch.full_like(row, number) for number, row in enumerate(rows)]
    fill = {"target_BT": -100, "task_BT": -1, "sample_BT": -1}.get(name, 0)
    return torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=fill)


def attend(module: TokenLoss, name: str) -> None:
    """Lets a module attend by the function of a name, or by transformers' block mask."""
    module.per_sample = module.one_row = module.told_of_samples = name != "block mask"
    base_of(module.model).set_attn_implementation("sdpa" if name == "block mask" else name)


def kernels(shape: Shape, precision: str, place: Place) -> Found:
    """Every kernel of attention has the losses and the gradient of sdpa sample by sample in float32 on the
    CPU, or in half precision of sdpa on the same device."""
    model, lengths = shape.model(), shorter(shape.lengths, place)
    data = [batch([lengths], sum(lengths), V, trained=shape.trained)]
    beside = TokenLoss(copy.deepcopy(model).train(), CausalLM("unused"))
    engine, module = prepared(model, precision)
    if not module.per_sample:  # transformers' mask alone
        return Found({"attends": "by transformers' mask"})
    if precision == "fp32":
        attend(beside, SDPA)
        nll_BT, router = beside(data[0])
        (nll_BT.sum() + router).backward()
        wanted = Pass(by_sample(nll_BT.detach(), data[0]))
        gradients = [p.grad for p in beside.parameters() if p.grad is not None]
        wanted.gradient = torch.cat([g.double().flatten() for g in gradients])
    else:
        attend(module, SDPA)
        wanted = passed(engine, module, data)
    found = Found()
    for name in shape.names if precision != "fp32" else (SDPA, *shape.names):
        attend(module, name)
        values = wanted.apart(passed(engine, module, data))
        found.values |= {f"{name} {key}": value for key, value in values.items()}
        found.below(EXACT if precision == "fp32" else HALF, f"{name} ")
    return found


def fewer_key_heads(place: Place) -> Found:
    """torch's varlen attention given fewer heads of keys equals repeated ones; whether it takes them by itself
    is reported and not required."""
    gpu = place.device == "cuda"
    ours = varlen() if gpu else Varlen(stand_in.varlen_2_13)
    assert ours is not None, "torch has no varlen attention"
    device, lengths = torch.device(place.device), [1, 64, 191]
    generator = torch.Generator().manual_seed(0)

    def draw(heads: int) -> Tensor:
        value = torch.randn(sum(lengths), heads, 64, generator=generator)
        return value.to(device, torch.bfloat16).requires_grad_()

    query, key, value = draw(8), draw(2), draw(2)
    borders = torch.tensor([0, 1, 65, 256], dtype=torch.int32, device=device)
    weight = torch.randn(sum(lengths), 8, 64, generator=generator).to(device)

    def run(call: Any, k: Tensor, v: Tensor) -> list[Tensor]:
        output = call(query, k, v, borders)
        gradients = torch.autograd.grad((output.float() * weight).sum(), (query, key, value))
        return [tensor.detach().float() for tensor in (output, *gradients)]

    repeated = [tensor.repeat_interleave(4, dim=1) for tensor in (key, value)]
    own = partial(ours, longest=max(lengths))
    wanted = run(own, *repeated)
    found = Found({"torch": torch.__version__, "enable_gqa": ours.shares_keys, "windows": ours.windows})

    def apart(got: list[Tensor]) -> float:
        return max(float((a - b).norm() / a.norm()) for a, b in zip(wanted, got, strict=True))

    found.values["gradient"] = apart(run(own, key, value))
    found.below({"gradient": HALF["gradient"]})
    try:  # without being told that there are fewer
        raw = Varlen(ours.function)
        raw.shares_keys = True
        found.values["as they are"] = apart(run(partial(raw, longest=max(lengths)), key, value))
    except Exception as error:
        found.values["as they are"] = f"{type(error).__name__}: {error}"[:200]
    return found


def _varied() -> dict[str, Shape]:
    heads = {
        f"heads 8/{kv} width {w}": Shape(kv_heads=kv, width=w) for kv in (8, 4, 1) for w in (32, 64, 128)
    }
    samples = {
        "one sample": (2047,),
        "two samples": (1, 2047),
        "60 samples": tuple(1 + 7 * number % 67 for number in range(60)),
    }
    return {
        **heads,
        **{name: Shape(lengths=rows) for name, rows in samples.items()},
        "window 64": Shape(kind="Mistral"),
        "chunk 128": Shape(kind="Llama4Text", names=(FAST, "block mask")),
        "nothing trained": Shape(trained=0.0),
    }


VARIED = _varied()
QUICK = {"heads 8/4 width 32", "60 samples"}

LAYOUTS = [Cell(f"A3 {p}", partial(layouts, p), 60, "quick") for p in ("fp32", "bf16")]
KERNELS = [
    *(
        Cell(f"A4 {name} {p}", partial(kernels, shape, p), 60, "quick" if name in QUICK else "long")
        for name, shape in VARIED.items()
        for p in ("fp32", "bf16")
    ),
    Cell("A4 fewer key heads", fewer_key_heads, 60, "quick"),
]
