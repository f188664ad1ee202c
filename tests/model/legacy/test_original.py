"""Original checkpoints of other sizes and settings than the fixtures, against a reference written by hand."""

from __future__ import annotations

import io
import json
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from mft.config.build import build
from mft.config.compose import compose_resolved
from mft.errors import UserError
from mft.model.legacy.native import NormHead
from mft.model.legacy.original import Original
from mft.model.legacy.pickled import convert
from tests.model import originals

NAMES = sorted(p.name for p in originals.FIXTURES.iterdir() if p.is_dir())


def family_of(name: str, folder: Path, *overrides: str) -> Original:
    family = build(compose_resolved([f"model={name}", f"model.path={folder}", *overrides]).model, "model")
    family.check()
    return family


def reference(folder: Path, ids_T: list[int], **options: object) -> torch.Tensor:
    config, weights = json.loads((folder / "config.json").read_text()), {}
    for file in folder.glob("*.safetensors"):
        weights |= {key: tensor.float() for key, tensor in load_file(file).items()}
    return originals.logits(config, weights, ids_T, **options)  # type: ignore[arg-type]


@pytest.mark.parametrize("name", NAMES)
def test_the_reference_is_right(name: str) -> None:
    expected = dict(np.load(originals.FIXTURES / name / "expected.npz"))
    options = {"norm_head": name.startswith("baichuan2")} | (
        {"rope_ratio": "positions"} if "32k" in name else {}
    )
    if name == "chatglm3_32k":
        del options["rope_ratio"]
    ids = expected["b1_s16.input_ids"][0].tolist()
    difference = reference(originals.FIXTURES / name, ids, **options) - torch.from_numpy(
        expected["b1_s16.logits"][0]
    )
    assert difference.abs().max() < 5e-5


GLM = {"num_layers": 3, "kv_channels": 8, "num_attention_heads": 4, "hidden_size": 64}
"""Heads that are together half as wide as the model."""
CASES: list[tuple[str, str, dict[str, object]]] = [
    ("chatglm2", "chatglm2_32k", GLM | {"multi_query_group_num": 1, "rope_ratio": None}),
    (
        "chatglm3",
        "chatglm3_32k",
        GLM | {"multi_query_group_num": 2, "rope_ratio": None, "padded_vocab_size": 131},
    ),
    (
        "codegeex2",
        "chatglm2_32k",
        GLM | {"multi_query_group_num": 4, "rope_ratio": None, "pad_token_id": None},
    ),
    ("chatglm2", "chatglm2_32k", {"multi_query_attention": False, "rope_ratio": None, "ffn_hidden_size": 52}),
    ("chatglm2", "chatglm2_32k", {"add_qkv_bias": False, "rope_ratio": 1}),
    ("chatglm2_32k", "chatglm2_32k", {"rope_ratio": 32, "multi_query_attention": False}),
    ("chatglm3_32k", "chatglm3_32k", {"rope_ratio": 500, "layernorm_epsilon": 1e-3}),
    (
        "qwen",
        "qwen",
        {"num_attention_heads": 2, "kv_channels": 32, "vocab_size": 301, "rotary_emb_base": 1000000},
    ),
    ("qwen", "qwen", {"num_hidden_layers": 1, "intermediate_size": 46, "layer_norm_epsilon": 1e-3}),
    ("baichuan_7b", "baichuan2_7b", {"vocab_size": 133, "num_attention_heads": 8}),
    (
        "baichuan2_7b",
        "baichuan2_7b",
        {"num_hidden_layers": 3, "rms_norm_eps": 1e-3, "max_position_embeddings": 64},
    ),
    ("baichuan_13b", "baichuan_13b", {"num_attention_heads": 12, "vocab_size": 133}),
    ("baichuan2_13b", "baichuan2_13b", {"num_attention_heads": 10, "hidden_size": 80}),
    ("baichuan_13b", "baichuan_13b", {"num_attention_heads": 4, "hidden_size": 64}),
    ("aquila2", "aquila2", {"num_key_value_heads": 1, "num_attention_heads": 8, "vocab_size": 133}),
    ("aquila2", "aquila2", {"num_key_value_heads": None, "rope_theta": 1000000.0}),
    ("aquila2", "aquila2", {"rope_scaling": {"type": "linear", "factor": 8.0}, "rms_norm_eps": 1e-3}),
    (
        "chatglm2",
        "chatglm2_32k",
        {"kv_channels": 12, "rope_ratio": None, "seq_length": 32, "original_rope": False},
    ),
    (
        "chatglm3",
        "chatglm3_32k",
        {"num_attention_heads": 6, "multi_query_group_num": 3, "quantization_bit": 0},
    ),
    ("chatglm3_32k", "chatglm3_32k", {"rope_ratio": 2.5, "multi_query_group_num": 3, "num_layers": 1}),
    (
        "chatglm2_32k",
        "chatglm2_32k",
        {"apply_query_key_layer_scaling": False, "attention_softmax_in_fp32": False},
    ),
    ("codegeex2", "chatglm2_32k", {"rope_ratio": None, "multi_query_group_num": 1, "add_qkv_bias": False}),
    (
        "qwen",
        "qwen",
        {"num_attention_heads": 8, "kv_channels": 8, "bf16": True, "fp32": False},
    ),
    ("qwen", "qwen", {"use_dynamic_ntk": False, "use_logn_attn": False, "seq_length": 8}),
    ("baichuan2_7b", "baichuan2_7b", {"z_loss_weight": 0, "num_attention_heads": 2}),
    ("baichuan_13b", "baichuan_13b", {"num_attention_heads": 40, "hidden_size": 160}),
    ("baichuan_13b", "baichuan_13b", {"num_attention_heads": 3, "model_max_length": 16}),
    ("baichuan2_13b", "baichuan2_13b", {"num_attention_heads": 1, "hidden_size": 24, "rms_norm_eps": 1e-3}),
    (
        "aquila2",
        "aquila2",
        {"num_key_value_heads": 4, "pretraining_tp": 2, "rope_scaling": {}},
    ),
]


def length(weights: Iterable[torch.Tensor]) -> float:
    """Returns the norm of all gradients together."""
    return float(torch.cat([tensor.grad.flatten() for tensor in weights]).norm())


@pytest.mark.parametrize(("name", "fixture", "values"), CASES)
def test_other_sizes(name: str, fixture: str, values: dict[str, object], tmp_path: Path) -> None:
    folder = originals.write(tmp_path, fixture, **values)
    model = family_of(name, folder).model(torch.float32).eval()
    ids = torch.randint(2, 120, (1, 40), generator=torch.Generator().manual_seed(0))
    rope = "positions" if name == "chatglm2_32k" else "base"
    config, weights = (
        json.loads((folder / "config.json").read_text()),
        load_file(folder / "model.safetensors"),
    )
    every = [tensor.requires_grad_() for tensor in weights.values()]
    norm = name.startswith("baichuan2")
    expected = originals.logits(config, weights, ids[0].tolist(), rope_ratio=rope, norm_head=norm)
    assert (model(ids).logits[0] - expected).abs().max() < 5e-5
    loss = torch.nn.functional.cross_entropy(expected[:-1], ids[0, 1:])
    loss.backward()
    ours = model(ids, labels=ids).loss
    ours.backward()
    assert abs(ours.item() - loss.item()) < 1e-5
    assert length(model.parameters()) == pytest.approx(length(every), rel=1e-5)
    assert isinstance(model.get_output_embeddings(), NormHead) == name.startswith("baichuan2")


@pytest.mark.parametrize(
    ("name", "head"),
    [("qwen", "lm_head"), ("aquila2", "lm_head"), ("baichuan_13b", "lm_head"), ("chatglm2_32k", "")],
)
def test_tied_heads(name: str, head: str, tmp_path: Path) -> None:
    """transformers ties the head of those whose code names it as one; chatglm's does not, whatever its config
    says."""
    folder = originals.write(tmp_path, name, tie_word_embeddings=True)
    weights = load_file(folder / "model.safetensors")
    if head:
        embedding = next(t for key, t in weights.items() if "wte" in key or "embed" in key)
        save_file(weights | {f"{head}.weight": embedding.clone()}, folder / "model.safetensors")
    model = family_of(name, folder).model(torch.float32).eval()
    ids = torch.arange(2, 30)[None]
    expected = reference(folder, ids[0].tolist(), rope_ratio="positions")
    assert (model(ids).logits[0] - expected).abs().max() < 5e-5
    assert (model.get_output_embeddings().weight is model.get_input_embeddings().weight) == bool(head)


@pytest.mark.parametrize(
    ("name", "fixture"), [("chatglm2", "chatglm2_32k"), ("qwen", "qwen"), ("aquila2", "aquila2")]
)
def test_shards_and_half_precision(name: str, fixture: str, tmp_path: Path) -> None:
    """Released files are in several shards and of bfloat16."""
    values = {"rope_ratio": None} if fixture == "chatglm2_32k" else {}
    folder = originals.write(tmp_path, fixture, dtype=torch.bfloat16, **values)
    originals.sharded(folder)
    family = family_of(name, folder)
    ids = torch.arange(2, 30)[None]
    difference = family.model(torch.float32).eval()(ids).logits[0] - reference(folder, ids[0].tolist())
    assert difference.abs().max() < 5e-5
    half = family.model(torch.bfloat16)
    assert {p.dtype for p in half.parameters()} == {torch.bfloat16}


BUFFERS = [
    ("chatglm2", "chatglm2_32k", "transformer.rotary_pos_emb.inv_freq"),
    ("qwen", "qwen", "transformer.rotary_emb.inv_freq"),
    ("baichuan_7b", "baichuan2_7b", "model.layers.1.self_attn.rotary_emb.inv_freq"),
    ("aquila2", "aquila2", "model.layers.1.self_attn.rotary_emb.inv_freq"),
]


@pytest.mark.parametrize(("name", "fixture", "buffer"), BUFFERS)
def test_one_pickle_in_float16_with_buffers(name: str, fixture: str, buffer: str, tmp_path: Path) -> None:
    """As the first releases came: one file, and in it buffers that the model makes itself."""
    values = {"rope_ratio": None} if fixture == "chatglm2_32k" else {}
    folder = originals.write(tmp_path, fixture, dtype=torch.float16, **values)
    torch.save(
        load_file(folder / "model.safetensors") | {buffer: torch.ones(8)}, folder / "pytorch_model.bin"
    )
    (folder / "model.safetensors").unlink()
    convert(folder)
    ids = torch.arange(2, 12)[None]
    family = family_of(name, folder)
    difference = family.model(torch.float32).eval()(ids).logits[0] - reference(folder, ids[0].tolist())
    assert difference.abs().max() < 5e-5
    assert {p.dtype for p in family.model(torch.float16).parameters()} == {torch.float16}


@pytest.mark.parametrize("name", ["chatglm2_32k", "qwen", "baichuan2_7b", "aquila2"])
def test_a_weight_that_is_missing_or_too_much_is_refused(name: str, tmp_path: Path) -> None:
    """Otherwise a layer would keep random weights, or a part of the checkpoint be left out, with a warning at
    best."""
    folder = originals.write(tmp_path, name)
    whole = load_file(folder / "model.safetensors")
    gone = next(key for key in whole if "proj" in key or "query_key_value" in key or "W_pack" in key)
    save_file(
        {k: t for k, t in whole.items() if k != gone}, folder / "model.safetensors", metadata={"format": "pt"}
    )
    with pytest.raises(UserError, match="lacks the weight"):
        family_of(name, folder).model(torch.float32)
    extra = {"model.layers.0.extra.weight": torch.ones(4)}
    save_file(whole | extra, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UserError, match=r"has the weight .*extra\.weight in model\.safetensors, which"):
        family_of(name, folder).model(torch.float32)


def test_what_qwen_does_beyond_its_length_is_named(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    family_of("qwen", originals.write(tmp_path, "qwen", use_dynamic_ntk=False))
    assert "use_logn_attn of" in caplog.text and "is left out: past 64 tokens (seq_length)" in caplog.text


def test_early_qwen_names(tmp_path: Path) -> None:
    """Configs of the first release call the sizes otherwise."""
    folder = originals.write(tmp_path, "qwen")
    config = json.loads((folder / "config.json").read_text())
    old = {"hidden_size": "n_embd", "num_attention_heads": "n_head", "num_hidden_layers": "n_layer"}
    old |= {"intermediate_size": "ffn_hidden_size", "vocab_size": "padded_vocab_size"}
    renamed = {old.get(key, key): value for key, value in config.items()}
    (folder / "config.json").write_text(json.dumps(renamed))
    ids = torch.arange(2, 30)[None]
    logits = family_of("qwen", folder).model(torch.float32).eval()(ids).logits[0]
    (folder / "config.json").write_text(json.dumps(config))
    assert (logits - reference(folder, ids[0].tolist())).abs().max() < 5e-5


REFUSED: list[tuple[str, dict[str, object], str]] = [
    ("chatglm2_32k", {"quantization_bit": 8}, "quantised already"),
    ("chatglm2_32k", {"pre_seq_len": 64}, "pre_seq_len=64"),
    ("chatglm2_32k", {"prefix_projection": True, "pre_seq_len": 64}, "pre_seq_len=64"),
    ("chatglm2_32k", {"apply_residual_connection_post_layernorm": True}, "apply_residual_connection"),
    ("qwen", {"quantization_config": {"quant_method": "gptq", "bits": 4}}, "quantised by gptq"),
    ("qwen", {"attn_dropout_prob": 0.1, "emb_dropout_prob": 0.1}, r"emb_dropout_prob=0\.1"),
    ("qwen", {"use_dynamic_ntk": True, "visual": {"width": 1}}, "visual"),
    ("baichuan2_7b", {"tie_word_embeddings": True}, "tie_word_embeddings=True"),
    ("aquila2", {"rope_scaling": {"type": "su", "factor": 2.0}}, "rope_scaling"),
    ("chatglm2_32k", {"fp32_residual_connection": True}, "fp32_residual_connection=True"),
    ("chatglm2_32k", {"interleaved_qkv": True}, "interleaved_qkv=True"),
    ("chatglm2_32k", {"rotary_percent": 1.0}, r"rotary_percent=1\.0"),
    ("chatglm3_32k", {"hidden_dropout": 0.1}, r"hidden_dropout=0\.1"),
    (
        "chatglm3_32k",
        {"multi_query_group_num": 2},
        "multi_query_group_num=2 .* does not divide num_attention_heads=3",
    ),
    ("qwen", {"scale_attn_weights": False}, "scale_attn_weights=False"),
    ("qwen", {"embd_pdrop": 0.1}, r"embd_pdrop=0\.1"),
    (
        "qwen",
        {"apply_residual_connection_post_layernorm": True},
        "apply_residual_connection_post_layernorm=True",
    ),
    ("baichuan_13b", {"num_attention_heads": 7}, "num_attention_heads=7 .* does not divide hidden_size=60"),
    ("aquila2", {"num_key_value_heads": 3}, "num_key_value_heads=3 .* does not divide num_attention_heads=4"),
]


@pytest.mark.parametrize(("name", "values", "message"), REFUSED)
def test_refused(name: str, values: dict[str, object], message: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=message):
        family_of(name, originals.write(tmp_path, name, **values))


def test_pickled_weights_are_refused_until_they_are_converted(tmp_path: Path) -> None:
    folder = originals.write(tmp_path, "qwen")
    originals.sharded(folder)
    ids = torch.arange(2, 12)[None]
    expected = reference(folder, ids[0].tolist())
    for number, file in enumerate(sorted(folder.glob("*.safetensors")), 1):
        torch.save(load_file(file), folder / f"pytorch_model-0000{number}-of-00002.bin")
        file.unlink()
    (folder / "model.safetensors.index.json").unlink()
    with pytest.raises(
        UserError, match=r"no \*\.safetensors file; pickled weights are not loaded: run mft convert /"
    ):
        family_of("qwen", folder)
    names = [file.name for file in convert(folder)]
    shards = [f"model-0000{i}-of-00002.safetensors" for i in (1, 2)]
    assert names == [*shards, "model.safetensors.index.json"]
    assert (
        family_of("qwen", folder).model(torch.float32).eval()(ids).logits[0] - expected
    ).abs().max() < 5e-5
    with pytest.raises(UserError, match=r"has model-00001-of-00002\.safetensors already"):
        convert(folder)


class Runs:
    def __reduce__(self):  # type: ignore[no-untyped-def]
        return print, ("code of the file",)


def test_a_pickle_that_would_run_code_is_refused(tmp_path: Path) -> None:
    tied = torch.ones(2, 3)
    torch.save({"a": tied, "b": tied}, tmp_path / "pytorch_model.bin")
    (single,) = convert(tmp_path)
    assert single.name == "model.safetensors" and load_file(single)["b"].equal(tied)
    single.unlink()
    for content in ({"a": Runs()}, {"a": 1}, [tied]):
        torch.save(content, tmp_path / "pytorch_model.bin")
        with pytest.raises(UserError, match="so it is not"):
            convert(tmp_path)
    old = io.BytesIO()
    torch.save({"a": tied}, old, _use_new_zipfile_serialization=False)
    cut = [old.getvalue()[:size] for size in (20, 60, -1)]
    for data in (b"version https://git-lfs", b"", b"\0" * 9, b"K\0\0\0\0\0", b"h\7", bytes(range(256)), *cut):
        (tmp_path / "pytorch_model.bin").write_bytes(data)
        unread = r"model\.bin cannot be read as tensors alone, so it is not read at all: ."
        with pytest.raises(UserError, match=unread):
            convert(tmp_path)
    assert not list(tmp_path.glob("*.safetensors"))
    (tmp_path / "pytorch_model.bin").unlink()
    for folder, message in ((tmp_path, "has no pytorch_model"), (tmp_path / "other", "is not a folder")):
        with pytest.raises(UserError, match=message):
            convert(folder)
