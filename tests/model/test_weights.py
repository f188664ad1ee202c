"""A model folder that is broken is told of in a sentence, with file, weight and shapes: most of it before
anything loads."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from mft.config.build import build
from mft.config.compose import compose_resolved
from mft.errors import UserError
from mft.model.causal_lm import CausalLM
from mft.model.peft.qlora import QLora
from mft.model.save import write_model
from tests.model import originals, quantised
from tests.model.families import tiny_model

INDEX = "model.safetensors.index.json"


def family(folder: Path, name: str = "auto") -> CausalLM:
    found = build(compose_resolved([f"model={name}", f"model.path={folder}"]).model, "model")
    assert isinstance(found, CausalLM)
    return found


@pytest.fixture
def llama(tmp_path: Path, tokenizer) -> Path:
    folder = tmp_path / "llama"
    folder.mkdir()
    write_model(tiny_model("llama"), folder)
    tokenizer.save_pretrained(folder)
    return folder


def settings(folder: Path, **values: object) -> None:
    """Changes values of config.json; None takes one out."""
    config = json.loads((folder / "config.json").read_text()) | values
    (folder / "config.json").write_text(
        json.dumps({k: v for k, v in config.items() if k not in values or v is not None})
    )


def cut(folder: Path) -> None:
    whole = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(whole[: len(whole) // 2])


def pointer(folder: Path) -> None:
    (folder / "model.safetensors").write_text(
        "version https://git-lfs.github.com/spec/v1\noid sha256:12\nsize 34\n"
    )


def text(folder: Path) -> None:
    (folder / "model.safetensors").write_text("<html>404</html>")


def lost(folder: Path) -> None:
    originals.sharded(folder)
    (folder / "model-00002-of-00002.safetensors").unlink()


def renamed(folder: Path) -> None:
    originals.sharded(folder)
    (folder / "model-00002-of-00002.safetensors").rename(folder / "model-00002-of-00002.1.safetensors")


def loose(folder: Path) -> None:
    originals.sharded(folder)
    (folder / INDEX).unlink()


def no_map(folder: Path) -> None:
    originals.sharded(folder)
    (folder / INDEX).write_text("{}")


def no_json(folder: Path) -> None:
    (folder / "config.json").write_text('{"model_type": "llama",')


FILES: list[tuple[Callable[[Path], None], str]] = [
    (
        cut,
        r"model\.safetensors is 231,\d+ bytes long where its header says 462,\d+; it is cut short: fetch "
        r"it again",
    ),
    (pointer, r"model\.safetensors is a pointer of git-lfs, not the file; fetch"),
    (text, r"model\.safetensors, 16 bytes long, is not a safetensors file: its header would take"),
    (
        lost,
        r"index\.json names model-00002-of-00002\.safetensors, which is not in the folder; 1 of 2 files",
    ),
    (renamed, r"which is not in the folder; did you mean model-00002-of-00002\.1\.safetensors\?"),
    (
        loose,
        r"has model-00001-of-00002\.safetensors, but neither model\.safetensors nor model\.safetens",
    ),
    (no_map, r"index\.json must be a JSON object with a weight_map"),
    (no_json, r"config\.json is not JSON: Expecting property name"),
    (
        lambda f: settings(f, model_type="lama"),
        r"no model type 'lama', which its config\.json names; did you mean l",
    ),
    (lambda f: settings(f, model_type=None), r"its config\.json has no model_type"),
]


@pytest.mark.parametrize(("harm", "message"), FILES)
def test_told_before_anything_loads(harm: Callable[[Path], None], message: str, llama: Path) -> None:
    harm(llama)
    with pytest.raises(UserError, match=message):
        family(llama).check()


def test_shards_that_are_whole_are_taken(llama: Path) -> None:
    before = family(llama).model(torch.float32).state_dict()
    originals.sharded(llama)
    checked = family(llama)
    checked.check()
    after = checked.model(torch.float32).state_dict()
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())


LOADED: list[tuple[dict[str, object], str]] = [
    (
        {"vocab_size": 400},
        r"lm_head\.weight in model\.safetensors is \[320, 64\], by .* it is \[400, 64\]; 1 more",
    ),
    (
        {"num_key_value_heads": 1},
        r"0\.self_attn\.k_proj\.weight in .* is \[32, 64\], by .* is \[16, 64\]",
    ),
    (
        {"hidden_size": None},
        r"20 more do not fit; config\.json has no hidden_size, so the default of Llama",
    ),
    (
        {"num_hidden_layers": 3},
        r"the weight model\.layers\.2\.input_layernorm\.weight of a LlamaForCausalLM, and 8",
    ),
    (
        {"hidden_size": "64"},
        r"config\.json: TypeError: Field 'hidden_size' expected int, got str \(value: '64'\)",
    ),
]


@pytest.mark.parametrize(("values", "message"), LOADED)
def test_weights_that_contradict_the_config(values: dict[str, object], message: str, llama: Path) -> None:
    settings(llama, **values)
    with pytest.raises(UserError, match=message):
        family(llama).model(torch.float32)


def test_a_quantised_weight_that_contradicts_the_config(llama: Path) -> None:
    """transformers takes it, whatever its shape, and the forward pass would fail."""
    settings(llama, intermediate_size=192)
    with pytest.raises(
        UserError, match=r"mlp\.down_proj\.weight in .* is \[64, 128\], by .* is \[64, 192\]; 5"
    ):
        family(llama).model(torch.float32, QLora().quantization(torch.float32))


def add(folder: Path, **tensors: torch.Tensor) -> None:
    weights = load_file(folder / "model.safetensors") | tensors
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


def fewer_layers(folder: Path) -> None:
    settings(folder, num_hidden_layers=1)


TOO_MANY: list[tuple[Callable[[Path], None], str]] = [
    (
        fewer_layers,
        r"has the weight model\.layers\.1\.input_layernorm\.weight in model\.safetensors, .*, and 8 others",
    ),
    (
        lambda f: add(f, **{"score.weight": torch.ones(1, 64)}),
        r"the weight score\.weight in .*, which a LlamaForCaus",
    ),
    (
        lambda f: add(f, **{"model.layers.0.mlp.up_proj.scales": torch.ones(4)}),
        r"up_proj\.scales in model\.safetensors",
    ),
    (
        lambda f: add(f, **{"model.layers.0.mlp.up_proj.bias": torch.ones(128)}),
        r"up_proj\.bias in model\.safetensors",
    ),
    (
        lambda f: add(f, **{"model.layers.0.self_attn.bias": torch.ones(64)}),
        r"self_attn\.bias in model\.safetensors",
    ),
    (
        lambda f: add(f, **{"visual.blocks.0.weight": torch.ones(4, 4)}),
        r"visual\.blocks\.0\.weight in model\.safete",
    ),
]


@pytest.mark.parametrize(("change", "message"), TOO_MANY)
def test_weights_that_the_model_does_not_take(
    change: Callable[[Path], None], message: str, llama: Path
) -> None:
    """Left out, the model would be another: fewer layers, no scales, no head that was trained."""
    change(llama)
    with pytest.raises(UserError, match=message):
        family(llama).model(torch.float32)


def test_weights_under_another_prefix(llama: Path) -> None:
    weights = load_file(llama / "model.safetensors")
    save_file(
        {f"module.{k}": v for k, v in weights.items()}, llama / "model.safetensors", metadata={"format": "pt"}
    )
    with pytest.raises(
        UserError, match=r"lacks the weight .*; .* has module\.lm_head\.weight, and 20 others instead"
    ):
        family(llama).model(torch.float32)


@pytest.mark.parametrize(
    "buffers",
    [
        {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(8)},
        {
            "model.layers.0.attn.bias": torch.ones(1, 1, 8, 8),
            "model.layers.0.attn.masked_bias": torch.tensor(-1e4),
        },
        {"model.position_ids": torch.arange(8)},
    ],
)
def test_buffers_of_older_releases_are_taken(buffers: dict[str, torch.Tensor], llama: Path) -> None:
    before = family(llama).model(torch.float32).state_dict()
    add(llama, **buffers)
    after = family(llama).model(torch.float32).state_dict()
    assert before.keys() == after.keys() and all(
        torch.equal(after[name], tensor) for name, tensor in before.items()
    )


def test_a_second_copy_of_a_tied_head_is_taken(llama: Path) -> None:
    settings(llama, tie_word_embeddings=True)
    assert family(llama).model(torch.float32).lm_head.weight.shape == (320, 64)


def test_a_base_packed_to_4_bits_that_contradicts_the_config(llama: Path, tmp_path: Path) -> None:
    quantised.bnb4(llama, tmp_path / "packed")
    settings(tmp_path / "packed", intermediate_size=192)
    message = r"down_proj\.weight in .* packed to 4 bits by bitsandbytes and stands for \[64, 128\], by .* \[64, 192\]"
    with pytest.raises(UserError, match=message):
        family(tmp_path / "packed").model(torch.float32, QLora().quantization(torch.float32))
    with pytest.raises(UserError, match=message):
        family(tmp_path / "packed").model(torch.float32, dequantise=True)


ORIGINAL: list[tuple[str, dict[str, object], str]] = [
    (
        "chatglm2_32k",
        {"padded_vocab_size": 160},
        r"output_layer\.weight in .* is \[152, 40\], .* it is \[160",
    ),
    (
        "chatglm2_32k",
        {"multi_query_group_num": 3},
        r"query_key_value\.bias in .* is \[80\], by config\.json it is \[144\]",
    ),
    (
        "qwen",
        {"intermediate_size": 100},
        r"h\.0\.mlp\.c_proj\.weight in .* \[64, 112\], .* it is \[64, 50\]",
    ),
    ("baichuan_13b", {"hidden_size": 80}, r"lm_head\.weight in .* is \[248, 60\], .* \[248, 80\]"),
    ("aquila2", {"num_key_value_heads": 4}, r"self_attn\.k_proj\.weight in model\.safetensors is \[32, 64\]"),
    (
        "qwen",
        {"num_hidden_layers": 3},
        r"the weight model\.layers\.2\.input_layernorm\.weight of a Qwen2ForCausalLM",
    ),
    (
        "qwen",
        {"num_hidden_layers": 1},
        r"has the weight transformer\.h\.1\..*, which a Qwen2ForCausalLM does not",
    ),
]


@pytest.mark.parametrize(("name", "values", "message"), ORIGINAL)
def test_original_weights_that_contradict_the_config(
    name: str, values: dict[str, object], message: str, tmp_path: Path
) -> None:
    folder = originals.write(tmp_path / name, name)
    settings(folder, **values)
    with pytest.raises(UserError, match=message):
        family(folder, name).model(torch.float32)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"hidden_size": None}, r"its config\.json has no hidden_size, which qwen has"),
        ({"hidden_size": "64"}, r"hidden_size='64' in its config\.json must be a number greater than 0"),
        ({"num_attention_heads": 0}, "num_attention_heads=0 in its"),
        ({"model_type": "qwn"}, "is of model type 'qwn', not 'qwen'"),
    ],
)
def test_original_configs(values: dict[str, object], message: str, tmp_path: Path) -> None:
    folder = originals.write(tmp_path / "qwen", "qwen")
    settings(folder, **values)
    with pytest.raises(UserError, match=message):
        family(folder, "qwen").check()


def test_a_folder_without_a_tokenizer(llama: Path) -> None:
    (llama / "tokenizer.json").unlink()
    with pytest.raises(UserError, match=r"has no tokenizer: no tokenizer\.json, .*copy the files of"):
        family(llama).tokenizer()


def test_a_weight_that_is_missing(llama: Path) -> None:
    weights = load_file(llama / "model.safetensors")
    del weights["model.layers.1.mlp.up_proj.weight"]
    save_file(weights, llama / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(
        UserError, match=r"lacks the weight model\.layers\.1\.mlp\.up_proj\.weight of a Llama"
    ):
        family(llama).model(torch.float32)
