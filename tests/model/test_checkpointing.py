"""Gradient checkpointing: the same gradients for every k, and `auto` by what a GPU's memory holds."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from mft.errors import UserError
from mft.model.causal_lm import CausalLM
from mft.model.checkpointing import Layers, layers_between
from mft.model.peft.full import Full
from mft.model.peft.lora import Lora
from mft.model.peft.qlora import QLora
from mft.model.token_loss import TokenLoss
from tests.model.rows import batch, inputs

H = 128
CLASSES = ["LlamaDecoderLayer", "GPTNeoXLayer", "Qwen3DecoderLayer", "Phi3DecoderLayer"]


def saved(name: str, folder: Path, layers: int, **values: Any) -> CausalLM:
    """Returns the family of a model of random weights, written to a folder."""
    import transformers

    values = {"vocab_size": 256, "pad_token_id": 0, "hidden_size": H, "num_attention_heads": 4} | values
    config = getattr(transformers, f"{name}Config")(
        num_hidden_layers=layers, intermediate_size=3 * H, tie_word_embeddings=False, **values
    )
    torch.manual_seed(0)
    transformers.AutoModelForCausalLM.from_config(config).save_pretrained(folder / f"{name}{layers}")
    return CausalLM(str(folder / f"{name}{layers}"))


@pytest.mark.parametrize(
    ("setting", "every"),
    [("auto", None), (True, 1), ("True", 1), ("false", 0), (False, 0), (1, 1), (2, 2), ("4", 4)],
)
def test_what_a_setting_means(setting: object, every: int | None) -> None:
    assert layers_between(setting) == every


@pytest.mark.parametrize("setting", [0, "0", -1, 1.5, "every", None])
def test_a_setting_that_means_nothing_is_refused(setting: object) -> None:
    with pytest.raises(UserError, match=r"^model\.gradient_checkpointing="):
        layers_between(setting)


@pytest.mark.parametrize("peft", [Full(), Lora(dropout=0.1)], ids=["full", "lora"])
def test_every_k_gives_the_same_gradients_to_the_bit(tmp_path: Path, peft: Full) -> None:
    family = saved("Llama", tmp_path, 4)
    torch.manual_seed(1)
    model: Any = peft.attach(family.model(torch.float32), family)
    for parameter in model.parameters():  # fresh adapters have no gradient in A
        parameter.data += 0.02 * torch.randn_like(parameter)
    found = {}
    for setting in (False, 1, 2, 3, 4):
        family.gradient_checkpointing = setting
        assert family.checkpoint(model) == int(setting)
        layers = [part for part in model.modules() if type(part).__name__ in CLASSES]
        flags = [part.gradient_checkpointing for part in layers]
        assert flags == [bool(setting) and number % setting == 0 for number in range(4)]
        model.zero_grad()
        torch.manual_seed(2)  # of the dropout
        TokenLoss(model, family)(*inputs(batch([[9, 12], [20]], 24, 256)))[0].sum().backward()
        found[setting] = {name: p.grad.clone() for name, p in model.named_parameters() if p.requires_grad}
    for gradients in found.values():
        assert all(torch.equal(gradients[name], value) for name, value in found[False].items())


def test_a_class_that_cannot_choose_layers_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One that ignores the number, as classes of a checkpoint's own code may."""
    family = saved("Llama", tmp_path, 2)
    model = family.model(torch.float32)
    enable = type(model).activation_checkpointing_enable
    monkeypatch.setattr(
        type(model), "activation_checkpointing_enable", lambda self, options, every_n_layers: enable(self)
    )
    family.gradient_checkpointing = 2
    with pytest.raises(UserError, match=r"gradient_checkpointing=2: LlamaForCausalLM .*choose true or false"):
        family.checkpoint(model)
    family.gradient_checkpointing = "auto"
    assert family.checkpoint(model, lambda: 2) == 1


def kept(family: CausalLM, peft: Full, half: bool, tokens: int) -> int:
    """Returns the bytes that autograd saves for a step of one row, without the parameters themselves."""
    dtype = torch.bfloat16 if half else torch.float32
    base = family.model(peft.dtype("bf16" if half else "fp32"), peft.quantization(dtype))
    module = TokenLoss(peft.attach(base, family), family).train()
    own = {tensor.untyped_storage().data_ptr() for tensor in (*module.parameters(), *module.buffers())}
    sizes: dict[int, tuple[int, torch.Tensor]] = {}  # the tensors stay alive, or their places are taken again

    def save(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            sizes[storage.data_ptr()] = (storage.nbytes(), tensor)
        return tensor

    hooks = torch.autograd.graph.saved_tensors_hooks(save, lambda tensor: tensor)
    with torch.autocast("cpu", torch.bfloat16, enabled=half), hooks:
        module(*inputs(batch([[tokens]], tokens, 256)))
    return sum(size for size, _ in sizes.values())


@pytest.mark.slow
@pytest.mark.parametrize("half", [True, pytest.param(False, marks=pytest.mark.long)], ids=["bf16", "fp32"])
@pytest.mark.parametrize(
    "peft", [Full(), Lora(), Lora(dropout=0.1), QLora(dropout=0.1)], ids=["full", "lora", "dropout", "qlora"]
)
@pytest.mark.parametrize(
    ("name", "values"),
    [
        ("Llama", {}),
        ("Llama", {"num_key_value_heads": 1}),
        ("GPTNeoX", {}),
        ("Qwen3", {"num_key_value_heads": 2, "head_dim": 32}),
        ("Phi3", {}),
        ("Llama", {"attention": "eager"}),
    ],
    ids=["llama", "grouped", "neox", "qwen3", "phi3", "eager"],
)
def test_the_estimate_is_above_what_is_kept_by_about_half_at_most(
    tmp_path: Path,
    name: str,
    values: dict[str, Any],
    peft: Full,
    half: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def on_gpu(x: torch.Tensor, p: float = 0.5, training: bool = True, inplace: bool = False) -> torch.Tensor:
        """Dropout as CUDA computes it: with a mask of bytes, where a CPU keeps one of x's dtype."""
        return torch.native_dropout(x, p, True)[0] if p and training else x

    monkeypatch.setattr(torch.nn.functional, "dropout", on_gpu)
    attention = values.pop("attention", "sdpa")
    sizes, few, many = {}, 256, 512
    for layers in (2, 4):
        family = saved(name, tmp_path, layers, **values)
        family.attention = attention
        for tokens in (few, many):
            sizes[layers, tokens] = kept(family, peft, half, tokens)
    # of a layer, by difference: without the copies of weights that autocast makes, which no token adds to
    measured = {n: (sizes[4, n] - sizes[2, n]) / 2 for n in (few, many)}
    model = peft.attach(family.model(torch.float32), family)
    per_token = (measured[many] - measured[few]) / (many - few)
    if attention == "eager":  # what a token keeps grows with its row
        per_token = measured[many] / many
    TokenLoss(model, family)  # fuses its layers
    estimate = Layers.of(model, CLASSES, half, longest=many).kept
    # what fused layers spare comes off both, so the same bytes of margin are a larger part
    assert 1.0 < estimate / per_token < 1.55, (estimate, per_token)


def test_fewer_layers_are_kept_the_more_are_recomputed() -> None:
    layers = Layers(32, 100.0, 4.0)
    every_fourth = 10 * (25 * 100.0 + 8 * 4.0)  # with the one that is being recomputed
    assert [layers.bytes(every, 10) for every in (0, 4, 1)] == [
        32000.0,
        every_fourth,
        10 * (100.0 + 32 * 4.0),
    ]
