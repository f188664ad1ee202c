"""Code that comes with a checkpoint: never run unless asked for, run with a warning where it is."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from mft.data.tokenize import Encoder
from mft.errors import UserError
from mft.model.causal_lm import CausalLM
from mft.model.generate import Answerer
from mft.model.legacy.families import Qwen
from mft.model.merge import merge
from mft.model.tiny import Tiny
from tests.model import originals
from tests.tiny_runs import train

CODE = """
from pathlib import Path
from transformers import LlamaConfig, LlamaForCausalLM

Path({mark!r}).touch()


class MineConfig(LlamaConfig):
    model_type = "mine"


class MineForCausalLM(LlamaForCausalLM):
    config_class = MineConfig

    def forward(self, *arguments, **options):
        return super().forward(*arguments, **options)
"""


@pytest.fixture
def mine(tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A checkpoint with a model type of its own; its code leaves tmp_path/ran."""
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    folder = tmp_path / "mine"
    folder.mkdir()
    for file in tiny.folder().iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    names = {
        "AutoConfig": "modeling_mine.MineConfig",
        "AutoModelForCausalLM": "modeling_mine.MineForCausalLM",
    }
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"model_type": "mine", "auto_map": names}))
    (folder / "modeling_mine.py").write_text(CODE.format(mark=str(tmp_path / "ran")))
    return folder


def test_it_is_not_run_unless_asked_for(mine: Path) -> None:
    with pytest.raises(
        UserError, match=r"no model type 'mine'.*code of its own, which model\.trust_remote_code=true"
    ):
        CausalLM(str(mine)).check()
    with pytest.raises(UserError, match="cannot be loaded"):
        CausalLM(str(mine)).model(torch.float32)
    assert not (mine.parent / "ran").exists()


def test_it_is_run_with_a_warning(
    mine: Path, cache_dir: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    asked = [
        "model=auto",
        f"model.path={mine}",
        "model.trust_remote_code=true",
        "peft=lora",
        "optimizer.lr=1e-2",
    ]
    summary, run = train(tmp_path, cache_dir, *asked, "train.max_steps=2")
    assert summary["status"] == "finished" and (tmp_path / "ran").exists()
    assert f"trust_remote_code=true: Python code that comes with {mine} will be run" in caplog.text
    with pytest.raises(UserError, match=r"code of its own"):  # the adapter's folder cannot ask for it
        merge(run / "final", tmp_path / "merged")
    assert merge(run / "final", tmp_path / "merged", trust_remote_code=True).difference < 1e-5
    caplog.clear()
    answerer = Answerer(run, Encoder.saved, trust_remote_code=True)
    assert "Python code of the model of" in caplog.text
    assert answerer.answer(["adding 3: what comes next?"], max_new_tokens=2, do_sample=False)


def test_original_formats_never_run_theirs(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    Qwen(str(originals.write(tmp_path, "qwen")), trust_remote_code=True).check()
    assert "trust_remote_code=true has no effect" in caplog.text
