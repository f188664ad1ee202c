"""An original checkpoint written as a native folder, by the command: adapters of the one work on the other,
and whoever has transformers and peft, but not mft, computes the same."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoTokenizer

from mft.cli import main
from mft.config.build import build
from mft.config.compose import compose_resolved
from mft.errors import UserError
from mft.model.generate import load
from mft.model.merge import merge
from mft.model.save import write_model
from tests.model import originals, vocabularies
from tests.model.families import tiny_model
from tests.model.vocabularies import released
from tests.tiny_runs import train

KINDS = ["chatglm2", "qwen", "baichuan_7b", "baichuan2_7b", "baichuan_13b"]
ALIBI = ("baichuan_13b",)
IDS = torch.randint(3, 700, (2, 24), generator=torch.Generator().manual_seed(0))

ELSEWHERE = """
import json, re, sys
from pathlib import Path

import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

root, found = Path(sys.argv[1]), {}

def compare(name):
    native, expected = root / name / "native", load_file(root / name / "expected.safetensors")
    base = AutoModelForCausalLM.from_pretrained(native).eval()
    adapted = PeftModel.from_pretrained(base, root / name / "run" / "final").eval()
    with torch.no_grad():
        logits = adapted(expected["ids"]).logits
        with adapted.disable_adapter():
            effect = (logits - adapted(expected["ids"]).logits).abs().max().item()
    tokenizer = AutoTokenizer.from_pretrained(native)
    found[name] = [(logits - expected["logits"]).abs().max().item(), effect, len(tokenizer), "mft" in sys.modules]

plain, own = json.loads(sys.argv[2])
for name in plain:
    compare(name)
for name in own:
    try:
        compare(name)
    except ValueError as error:
        assert "`mft_alibi`" in str(error) and "does not recognize" in str(error), error
    else:
        raise AssertionError("loaded without its class")
line, = re.findall("^import mft.*$", (root / own[0] / "native" / "README.md").read_text(), re.M)
exec(line)
for name in own:
    compare(name)
print(json.dumps(found))
"""


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory, cache_dir: Path) -> Path:
    """For each family a released checkpoint, an adapter trained on it, the logits of both, and the native
    folder."""
    root = tmp_path_factory.mktemp("native")
    for name in KINDS:
        folder = released(root / name / "source", name)
        asked = [
            "peft=lora",
            f"model={name}",
            f"model.path={folder}",
            "train.max_steps=2",
            "optimizer.lr=1e-2",
        ]
        train(root, cache_dir, *asked, out=f"{name}/run")
        model = load(root / name / "run" / "final").eval()
        with torch.no_grad():
            logits = model(IDS).logits
        save_file({"ids": IDS, "logits": logits}, root / name / "expected.safetensors")
        main(["convert", f"model={name}", f"model.path={folder}", "--out", str(root / name / "native")])
    return root


@pytest.mark.slow
def test_adapters_work_on_the_native_folder_without_mft(written: Path) -> None:
    plain = [name for name in KINDS if name not in ALIBI]
    done = subprocess.run(
        [sys.executable, "-c", ELSEWHERE, str(written), json.dumps([plain, ALIBI])],
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    assert sorted(found) == sorted(KINDS)
    for name, (difference, effect, _, ours) in found.items():
        assert difference < 2e-5 < 1e-2 < effect
        assert ours == (name in ALIBI)


@pytest.mark.slow
def test_tokenizers_are_the_same(written: Path) -> None:
    for name in KINDS:
        overrides = [f"model={name}", f"model.path={written / name / 'source'}"]
        before = build(compose_resolved(overrides).model, "model").tokenizer()
        for folder in ("run/final", "native"):
            after = AutoTokenizer.from_pretrained(written / name / folder)
            for text in vocabularies.TEXTS:
                ids = before(text).input_ids
                assert after(text).input_ids == ids and after.decode(ids) == before.decode(ids)
            assert (after.eos_token, after.pad_token) == (before.eos_token, before.pad_token)


@pytest.mark.slow
def test_an_adapter_is_merged_into_either(written: Path) -> None:
    adapter, native = written / "baichuan2_7b" / "run" / "final", written / "baichuan2_7b" / "native"
    result = merge(adapter, written / "merged", base=str(native))
    assert result.difference < 1e-5 < result.effect
    expected = load_file(written / "baichuan2_7b" / "expected.safetensors")["logits"]
    with torch.no_grad():
        assert (load(written / "merged").eval()(IDS).logits - expected).abs().max() < 2e-5
    with pytest.raises(UserError, match="is not the one the adapter was trained on"):
        merge(adapter, written / "other", base=str(written / "chatglm2" / "native"))


@pytest.mark.parametrize("name", ["chatglm3_32k", "chatglm2_32k", "aquila2"])
def test_positions_are_also_written_as_transformers_4_reads_them(
    name: str, tokenizer, tmp_path: Path
) -> None:
    """It would take the base's default of 10,000, compute other logits, and say nothing: a chatglm3-32k
    written without these names differed by 0.19 from itself in transformers 4.57, and by 0 with them."""
    scaled = {"rope_scaling": {"type": "linear", "factor": 2.0}} if name == "aquila2" else {}
    folder = originals.write(tmp_path / "source", name, **scaled)
    tokenizer.save_pretrained(folder)
    main(["convert", f"model={name}", f"model.path={folder}", "--out", str(tmp_path / "native")])
    values = json.loads((tmp_path / "native" / "config.json").read_text())
    assert values["rope_theta"] == (500_000 if name == "chatglm3_32k" else 10_000)
    assert values.get("partial_rotary_factor") == (None if name == "aquila2" else 0.5)
    linear = {"chatglm2_32k": 16, "aquila2": 2}
    if name in linear:
        assert (values["rope_scaling"]["rope_type"], values["rope_scaling"]["factor"]) == (
            "linear",
            linear[name],
        )
    both = AutoConfig.from_pretrained(tmp_path / "native").to_dict()
    former = {"rope_theta", "partial_rotary_factor", "rope_scaling", "torch_dtype"}
    alone = {key: value for key, value in values.items() if key not in former}
    (tmp_path / "native" / "config.json").write_text(json.dumps(alone))
    assert AutoConfig.from_pretrained(tmp_path / "native").to_dict() == both
    names = json.loads((tmp_path / "native" / "tokenizer_config.json").read_text())
    assert names["tokenizer_class"] == "PreTrainedTokenizerFast"  # transformers 4 knows no TokenizersBackend


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["model=llama", "model.path=/no/where", "--out", "y"], "model.path=/no/where does not exist"),
        (
            ["model=qwen", "peft=lora", "--out", "y"],
            r"or model=…, model\.… and --out DIR, got model=qwen",
        ),
        (["model=qwen", "model.path=x"], "takes a folder alone"),
        (["model=qwen", "model.pth=x", "--out", "y"], "did you mean path"),
        (["model=qwen", "model.path=/no/where", "--out", "y"], "model.path=/no/where does not exist"),
        (
            ["model=qwen", f"model.path={originals.FIXTURES / 'qwen'}", "--out", str(originals.FIXTURES)],
            "exists already",
        ),
    ],
)
def test_what_convert_refuses(words: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["convert", *words])
    assert re.search(message, capsys.readouterr().err)


def test_convert_as_a_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """In a process of its own: pickled weights become safetensors. Then its help, and what a second call
    says."""
    folder = originals.write(tmp_path / "aquila", "aquila2")
    weights = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    torch.save(weights, folder / "pytorch_model.bin")
    words = [sys.executable, "-m", "mft.cli", "convert", str(folder)]
    done = subprocess.run(words, capture_output=True, text=True, check=True, timeout=300)
    assert done.stdout == f"{folder / 'model.safetensors'}\n"
    written = load_file(folder / "model.safetensors")
    assert written.keys() == weights.keys() and all(
        torch.equal(written[key], weights[key]) for key in weights
    )
    main(["convert", "--help"])
    assert "--out NATIVE" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        main(["convert", str(folder)])
    assert "has model.safetensors already; models are loaded from it" in capsys.readouterr().err


def test_other_names_of_transformers_4(tmp_path: Path) -> None:
    expected = {
        "gpt_neox": {"rotary_pct": 0.25, "rotary_emb_base": 10_000, "torch_dtype": "float32"},
        "qwen3_moe": {"num_experts": 4, "rope_theta": 10_000, "torch_dtype": "float32"},
    }
    for name, names in expected.items():
        (tmp_path / name).mkdir()
        write_model(tiny_model(name), tmp_path / name)
        values = json.loads((tmp_path / name / "config.json").read_text())
        assert {key: values[key] for key in names} == names
