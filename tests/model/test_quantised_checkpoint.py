"""A base that is quantised on disk is refused before anything loads, with the way out; mft convert writes the
values that its numbers stand for; and peft=qlora trains beside one of bitsandbytes."""

from __future__ import annotations

import json
import shutil
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from mft.cli import main
from mft.errors import UserError
from mft.model.causal_lm import CausalLM
from mft.model.export import save_final
from mft.model.merge import merge
from mft.model.origin import Origin
from mft.model.peft.full import Full
from mft.model.peft.lora import Lora
from mft.model.peft.qlora import QLora
from mft.model.save import write_model
from tests.model import quantised
from tests.model.families import tiny_model
from tests.model.rows import batch
from tests.model.steps import logits, trained

IDS = torch.arange(2, 42)[None]
LLAMA = {
    "fp8": (quantised.fp8, 448),
    "fp8_whole": (quantised.fp8_whole, 448),
    "mxfp8": (quantised.mxfp8, 448),
    "bnb4": (quantised.bnb4, 255),
    "bnb8": (quantised.bnb8, 127),
}
"""What writes a llama in each way, and the largest number that its weights are on disk."""

OTHERS = {"fp8": ("qwen3_moe", quantised.fp8), "mxfp4": ("gpt_oss", quantised.mxfp4)}
"""Mixtures of experts, whose weights are stacked while loading."""


def plain(folder: Path, name: str, tokenizer: Any) -> Path:
    folder.mkdir(parents=True)
    write_model(tiny_model(name), folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture
def llama(tmp_path: Path, tiny_folder: Path) -> Path:
    return Path(shutil.copytree(tiny_folder, tmp_path / "plain"))


def same(model: Any, true: dict[str, torch.Tensor]) -> bool:
    return all(
        torch.equal(tensor, true[name].float()) for name, tensor in model.state_dict().items() if name in true
    )


def convert(folder: Path, out: Path) -> CausalLM:
    main(["convert", f"model.path={folder}", "--out", str(out)])
    return CausalLM(str(out))


def config(folder: Path, **values: Any) -> None:
    found = json.loads((folder / "config.json").read_text()) | values
    (folder / "config.json").write_text(json.dumps(found))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("kind", LLAMA)
def test_convert_writes_the_true_values(kind: str, dtype: str, llama: Path, tmp_path: Path) -> None:
    write, largest = LLAMA[kind]
    true = write(llama, tmp_path / kind)
    config(tmp_path / kind, dtype=dtype, torch_dtype=dtype)
    model = convert(tmp_path / kind, tmp_path / "out").model(torch.float32)
    rounded = {name: tensor.to(getattr(torch, dtype)) for name, tensor in true.items()}
    assert same(model, rounded) and not hasattr(model.config, "quantization_config")
    with safe_open(tmp_path / "out" / "model.safetensors", "pt") as file:
        names = list(file.keys())
        assert {file.get_slice(n).get_dtype() for n in names} == {
            {"float32": "F32", "bfloat16": "BF16"}[dtype]
        }
    name = "model.layers.0.mlp.down_proj.weight"
    stored, whole = load_file(tmp_path / kind / "model.safetensors"), load_file(llama / "model.safetensors")
    assert stored[name].float().abs().max() > largest / 2  # what training would have begun from
    assert (model.get_parameter(name) - whole[name]).abs().max() < whole[name].abs().max() / 6


@pytest.mark.parametrize("kind", OTHERS)
def test_convert_writes_the_true_values_of_experts(kind: str, tokenizer: Any, tmp_path: Path) -> None:
    name, write = OTHERS[kind]
    whole = plain(tmp_path / "plain", name, tokenizer)
    true = write(whole, tmp_path / kind)
    quantised.write(whole, tmp_path / "true", true, None)
    found = logits(convert(tmp_path / kind, tmp_path / "out").model(torch.float32), IDS)
    assert torch.equal(found, logits(CausalLM(str(tmp_path / "true")).model(torch.float32), IDS))
    _, info = AutoModelForCausalLM.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not info["unexpected_keys"] and not info["missing_keys"]


MODES = {"full": Full(), "lora": Lora(), "qlora4": QLora(), "qlora8": QLora(bits=8)}


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("kind", LLAMA)
def test_refused_in_each_mode_before_anything_loads(
    kind: str, mode: str, llama: Path, tmp_path: Path
) -> None:
    LLAMA[kind][0](llama, tmp_path / kind)
    family, peft = CausalLM(str(tmp_path / kind)), MODES[mode]
    family.check()
    if (kind, mode) in (("bnb4", "qlora4"), ("bnb8", "qlora8")):
        peft.check_against(family, "fp32")
        return
    message = r"`mft convert model\.path=\S+ --out FOLDER`, and train on that folder"
    begun = time.perf_counter()
    with pytest.raises(UserError, match=message) as refusal:
        peft.check_against(family, "fp32")
    assert time.perf_counter() - begun < 1
    assert {"fp8_whole": "fp8", "bnb4": "bitsandbytes", "bnb8": "bitsandbytes"}.get(kind, kind) in str(
        refusal.value
    )
    with pytest.raises(UserError, match=message):  # also where only a rank sees the files
        family.model(torch.float32, peft.quantization(torch.float32))


@pytest.mark.parametrize(("kind", "bits"), [("bnb4", 4), ("bnb8", 8)])
@pytest.mark.parametrize("noted", [True, False])
def test_qlora_on_a_base_of_bitsandbytes(
    kind: str, bits: int, noted: bool, llama: Path, tokenizer: Any, tmp_path: Path
) -> None:
    """Trained, saved, loaded again and merged, also where the adapter does not say what it was trained on."""
    LLAMA[kind][0](llama, tmp_path / kind)
    module = trained(QLora(bits=bits), CausalLM(str(tmp_path / kind)), batch([[20, 9], [30]], 32, 512))
    save_final(module, tokenizer, tmp_path / "final")
    expected = logits(module.model, IDS)
    if not noted:
        (tmp_path / "final" / "mft.json").unlink()
    again = PeftModel.from_pretrained(Origin.read(tmp_path / "final").load(), tmp_path / "final")
    assert torch.equal(logits(again, IDS), expected)
    result = merge(tmp_path / "final", tmp_path / "merged")
    assert result.difference < result.bound < result.effect
    written = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype=torch.float32)
    assert (logits(written, IDS) - expected).abs().max() <= result.bound
    CausalLM(str(tmp_path / "merged")).check()


@pytest.mark.parametrize("mode", MODES)
def test_what_was_converted_trains_and_merges(mode: str, llama: Path, tokenizer: Any, tmp_path: Path) -> None:
    quantised.fp8(llama, tmp_path / "fp8")
    family = convert(tmp_path / "fp8", tmp_path / "real")
    MODES[mode].check_against(family, "fp32")
    module = trained(MODES[mode], family, batch([[20, 9], [30]], 32, 512))
    save_final(module, tokenizer, tmp_path / "final")
    if mode != "full":
        result = merge(tmp_path / "final", tmp_path / "merged")
        assert result.difference < result.bound < result.effect


def test_merge_and_generate_name_the_way_as_well(
    llama: Path, tokenizer: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """An adapter that other software trained on a base in fp8."""
    quantised.fp8(llama, tmp_path / "fp8")
    save_final(
        trained(Lora(), CausalLM(str(llama)), batch([[20, 9]], 32, 512)), tokenizer, tmp_path / "adapter"
    )
    (tmp_path / "adapter" / "mft.json").unlink()
    file = tmp_path / "adapter" / "adapter_config.json"
    file.write_text(
        json.dumps(json.loads(file.read_text()) | {"base_model_name_or_path": str(tmp_path / "fp8")})
    )
    with pytest.raises(
        UserError, match=r"the base model .*quantised by fp8; write its real values once, `mft convert"
    ):
        merge(tmp_path / "adapter", tmp_path / "merged")
    convert(tmp_path / "fp8", tmp_path / "real")
    merge(tmp_path / "adapter", tmp_path / "merged", base=str(tmp_path / "real"))
    assert "written to" in capsys.readouterr().out


def test_a_plain_folder_has_nothing_to_convert(
    llama: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        main(["convert", f"model.path={llama}", "--out", str(tmp_path / "other")])
    assert "is native already: neither quantised nor in an original format" in capsys.readouterr().err


def test_settings_that_a_quantised_base_does_not_take_are_reported(
    llama: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    quantised.bnb(llama, tmp_path / "fp4", 4)
    family = CausalLM(str(tmp_path / "fp4"))
    QLora(skip_modules=["o_proj"]).check_against(family, "fp32")
    assert (
        "keeps its own skip_modules=[] (setting: ['o_proj']), quant_type=fp4 (setting: nf4), double_quant=False"
        in (caplog.text)
    )
    peft = QLora(compute_dtype="bf16")
    model = family.model(torch.float32, peft.quantization(torch.float32))
    assert model.model.layers[0].mlp.up_proj.compute_dtype == torch.bfloat16


# ── refused by config.json and headers alone ──

UNREAD = [
    *(
        "gptq",
        "awq",
        "aqlm",
        "autoround",
        "auto-round",
        "bitnet",
        "eetq",
        "fbgemm_fp8",
        "fp_quant",
        "higgs",
        "hqq",
    ),
    *(
        "modelopt",
        "nvfp4",
        "quanto",
        "quark",
        "sinq",
        "spqr",
        "torchao",
        "vptq",
        "gemma",
        "metal",
        "exl2",
        "somebody's",
    ),
]


def refused(folder: Path, message: str) -> None:
    begun = time.perf_counter()
    with pytest.raises(UserError, match=message):
        CausalLM(str(folder)).check()
    assert time.perf_counter() - begun < 1


@pytest.mark.parametrize("method", UNREAD)
def test_a_method_that_is_not_read(method: str, llama: Path) -> None:
    config(llama, quantization_config={"quant_method": method, "bits": 4})
    refused(
        llama,
        rf"quantised by .*{method}.*, as config\.json says, .*; give the release of this model that is not",
    )


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"quantization_config": {"bits": 4}}, "does not name a quantisation method"),
        ({"quantization_config": {}}, "does not name a quantisation method"),
        ({"quantization_config": {"quant_method": "bitsandbytes"}}, "does not name a quantisation method"),
        ({"quantization_config": "gptq"}, r"quantization_config in its config\.json must be an object"),
        ({"quantization_config": {"quant_method": ["\x1b[2J"]}}, r"quantised by \['\\x1b\[2J'\]"),
        (
            {"compression_config": {"quant_method": "compressed-tensors"}},
            r"as compression_config in its config\.json",
        ),
        ({"text_config": {"quantization_config": {"quant_method": "awq"}}}, "quantised by awq"),
        (
            {"vision_config": {"quantization_config": {"quant_method": "fp8"}}},
            r"as vision_config\.quantization_config",
        ),
        ({"a": {"b": {"quantization_config": {"load_in_4bit": True}}}}, r"as a\.b\.quantization_config"),
        (
            {"quantization_config": {"load_in_4bit": True}},
            r"by bitsandbytes, but all [0-9]+ are plain F32; if these are real values, remove quantiz",
        ),
        ({"quantization_config": {"quant_method": "fp8"}}, r"by fp8, but all [0-9]+ are plain F32"),
        (
            {"quantization_config": {"quant_method": "fp8", "modules_to_convert": ["embed"]}},
            "with embeddings in fp8",
        ),
    ],
)
def test_configs_that_contradict_the_weights(values: dict[str, Any], message: str, llama: Path) -> None:
    config(llama, **values)
    refused(llama, message)


def layer(**tensors: torch.Tensor) -> dict[str, torch.Tensor]:
    return {f"model.layers.0.mlp.up_proj.{name}": tensor for name, tensor in tensors.items()}


SOME = torch.ones(128, 64)
F8 = SOME.to(torch.float8_e4m3fn)
BYTES, INTS = SOME.to(torch.uint8), SOME.to(torch.int32)
FP8 = {"quant_method": "fp8", "weight_block_size": [128, 128]}
PACKED: dict[str, tuple[dict[str, torch.Tensor], dict[str, Any] | None, str]] = {
    "fp8": (
        layer(weight=F8),
        None,
        r"\(.*up_proj\.weight is F8_E4M3\), but its config\.json has no quantization_config",
    ),
    "e5m2": (layer(weight=SOME.to(torch.float8_e5m2)), None, "is F8_E5M2"),
    "int8": (layer(weight=SOME.to(torch.int8), weight_scale=SOME[0]), None, "is I8"),
    "uint8": (layer(weight=BYTES), None, "is U8"),
    "gptq": (layer(qweight=INTS, qzeros=INTS, scales=SOME, g_idx=INTS[:, 0]), None, "is I32, and 1 other"),
    "hqq": (layer(W_q=BYTES, scale=SOME), None, "W_q is U8"),
    "packed": (layer(weight_packed=INTS), None, "weight_packed is I32"),
    "bnb4": (
        layer(
            **{"weight": BYTES, "weight.quant_state.bitsandbytes__nf4": BYTES[0], "weight.absmax": SOME[0]}
        ),
        None,
        r"holds weights packed to 4 bits by bitsandbytes \(model\.layers\.0\.mlp\.up_proj\.weight, and 1 "
        r"other\), but",
    ),
    "bnb4_in_bf16": (
        layer(**{"weight": SOME.bfloat16(), "weight.quant_state.bitsandbytes__nf4": BYTES[0]}),
        None,
        "packed to 4 bits by bitsandbytes",
    ),
    "adapter": (
        {"base_model.model.q_proj.lora_A.default.weight": SOME},
        None,
        "holds weights of an adapter among",
    ),
    "vllm": (
        layer(weight=F8, weight_scale=SOME[0, 0], input_scale=SOME[0, 0]),
        FP8,
        r"no scale called .*_scale_inv",
    ),
    "ragged": (
        layer(weight=F8, weight_scale_inv=SOME[:2, :1]),
        FP8 | {"weight_block_size": [96, 64]},
        "not divided ev",
    ),
    "columns": (
        layer(weight=F8, weight_scale_inv=SOME[:1, :2]),
        FP8 | {"weight_block_size": [128, 48]},
        "not divided",
    ),
    "no_blocks": (
        layer(weight=F8, weight_scale_inv=SOME[:2, :2]),
        FP8 | {"weight_block_size": None},
        "not its blocks",
    ),
    "fused": (
        {"model.layers.0.experts.gate_up_proj": F8[None]},
        FP8,
        r"no scale called .*gate_up_proj_scale_inv",
    ),
    "fp4_experts": (layer(weight=SOME.to(torch.int8), weight_scale_inv=SOME), FP8, "no scale called"),
    "half_4_bits": (layer(weight=BYTES), {"load_in_4bit": True}, r"\(U8\) lacks its state of 4 bits"),
    "half_8_bits": (
        layer(weight=SOME.to(torch.int8)),
        {"load_in_8bit": True},
        r"\(I8\) lacks its state of 8 bits",
    ),
    "mxfp4": (
        {"model.layers.0.experts.down_proj_blocks": BYTES},
        {"quant_method": "mxfp4"},
        "no .*_scales beside it",
    ),
    "mxfp4_linear": (
        layer(weight=BYTES),
        {"quant_method": "mxfp4"},
        "not one of the experts' blocks and scales",
    ),
}


@pytest.mark.parametrize("kind", PACKED)
def test_weights_that_cannot_be_read(kind: str, llama: Path, tmp_path: Path) -> None:
    tensors, settings, message = PACKED[kind]
    kept = {k: v for k, v in load_file(llama / "model.safetensors").items() if k not in tensors}
    quantised.write(llama, tmp_path / kind, kept | {k: v.contiguous() for k, v in tensors.items()}, settings)
    refused(tmp_path / kind, message)


@pytest.mark.parametrize("file", ["quantize_config.json", "quant_config.json"])
def test_releases_that_say_it_in_a_file_of_their_own(file: str, llama: Path, tmp_path: Path) -> None:
    quantised.write(llama, tmp_path / "old", layer(qweight=INTS, qzeros=INTS, scales=SOME), None)
    (tmp_path / "old" / file).write_text('{"bits": 4}')
    refused(tmp_path / "old", rf"qweight is I32, .*\({file} belongs to a release of GPTQ or AWQ\)")


def test_whole_numbers_that_a_plain_model_has(llama: Path) -> None:
    """Causal masks and tables of ids, as older releases carry them."""
    weights = load_file(llama / "model.safetensors")
    mask = {"model.layers.0.self_attn.bias": torch.ones(1, 1, 8, 8, dtype=torch.uint8)}
    save_file(weights | mask, llama / "model.safetensors", metadata={"format": "pt"})
    family = CausalLM(str(llama))
    family.check()
    assert same(family.model(torch.float32), weights)


def test_shards_are_judged_each(llama: Path, tmp_path: Path) -> None:
    quantised.write(llama, tmp_path / "shards", {}, None)
    folder = tmp_path / "shards"
    (folder / "model.safetensors").unlink()
    save_file(layer(weight=SOME), folder / "model-1.safetensors")
    save_file(layer(other=F8), folder / "model-2.safetensors")
    names = {
        name: f"model-{1 + ('other' in name)}.safetensors" for name in [*layer(weight=SOME), *layer(other=F8)]
    }
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": names}))
    refused(folder, r"up_proj\.other is F8_E4M3")
    save_file(layer(other=SOME), folder / "model-2.safetensors")
    save_file(layer(other=F8), folder / "consolidated.safetensors")  # which nothing reads
    CausalLM(str(folder)).check()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            {"format": "nvfp4-pack-quantized", "config_groups": {"group_0": {}}},
            "of the format nvfp4-pack-quantized",
        ),
        ({"format": "pack-quantized", "config_groups": {"group_0": {}, "group_1": {}}}, "in 2 groups"),
        (
            {"format": "pack-quantized", "config_groups": {"a": {}}, "sparsity_config": {"format": "24"}},
            "with sparsity",
        ),
    ],
)
def test_compressed_tensors(
    settings: dict[str, Any], message: str, llama: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    config(llama, quantization_config={"quant_method": "compressed-tensors"} | settings)
    (tmp_path / "compressed_tensors.py").touch()
    monkeypatch.syspath_prepend(tmp_path)
    refused(llama, message)


def test_pickled_weights_that_are_quantised_are_not_converted(llama: Path) -> None:
    torch.save(layer(qweight=INTS, qzeros=INTS, scales=SOME), llama / "pytorch_model.bin")
    (llama / "model.safetensors").unlink()
    before = {file.name for file in llama.iterdir()}
    with pytest.raises(SystemExit):
        main(["convert", str(llama)])
    assert {file.name for file in llama.iterdir()} == before
    config(llama, quantization_config={"quant_method": "gptq", "bits": 4})
    with pytest.raises(SystemExit):
        main(["convert", str(llama)])


def test_an_adapter_beside_the_base(llama: Path) -> None:
    (llama / "adapter_config.json").write_text('{"base_model_name_or_path": "owner/name"}')
    refused(llama, r"holds an adapter_config\.json beside its config\.json")
