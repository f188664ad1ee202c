"""A rehearsal goes through what a run goes through, on a tiny scale, and leaves nothing but the token cache."""

from __future__ import annotations

from pathlib import Path

import pytest

from mft.cli import main
from mft.config.compose import compose_resolved
from mft.config.schema import freeze, read
from mft.errors import UserError
from mft.launch import job
from mft.plan.gpus import device
from mft.rehearsal.rehearse import Rehearsal
from tests.selection import long
from tests.sweeping import FAST, mft
from tests.sweeping import two_tasks as docs_and_code
from tests.tiny_runs import two_tasks

LOSS = """
import os
from dataclasses import dataclass
from mft.loss.base import TaskLoss

@dataclass
class Failing(TaskLoss):
    def share(self, nll_BT, batch, counts, statistics=None):
        raise IndexError("list index out of range")

@dataclass
class Crashing(TaskLoss):
    def share(self, nll_BT, batch, counts, statistics=None):
        os.abort()
"""


def rehearse(tmp_path: Path, cache_dir: Path, *overrides: str) -> Path:
    """Rehearses in this process; returns the temporary folder, which is kept here."""
    given = ["debug=fast", f"cache_dir={cache_dir}", f"output_dir={tmp_path / 'run'}"]
    given += [two_tasks(tmp_path / "tasks"), *overrides]
    checked = job.checked(compose_resolved(given), given, starts=False)
    folder = tmp_path / "temporary"
    folder.mkdir()
    freeze(checked.cfg, folder / "config.yaml")
    rehearsal = Rehearsal(folder, tmp_path / "run", checked.world, device("cpu"))
    rehearsal.perform(read(folder / "config.yaml"))
    return folder


@pytest.mark.parametrize(
    "overrides",
    [
        ["peft=lora", "data=pack"],
        ["peft=lora", "data=pad", "loss=coba", "peft.init=pissa"],
        ["peft=qlora", "data=pack", "optimizer=adamw8bit"],
        ["peft=full", "data=pad", "train.precision=bf16", "model.add_tokens=['<new>']"],
        [
            "peft=lora",
            "peft.modules_to_save=[lm_head]",
            "data.split=[90,0,10]",
            "dist=zero3",
            "launch.nproc=2",
        ],
    ],
)
def test_data_memory_and_a_step_are_shown(
    overrides: list[str], tmp_path: Path, cache_dir: Path, capsys
) -> None:
    rehearse(tmp_path, cache_dir, *overrides)
    said = " ".join(capsys.readouterr().out.split())
    for words in (
        "dropped and cut",
        "mixture: natural",
        "a step",
        "trained: ",
        "memory of a rank: cpu, ",
        "activations",
    ):
        assert words in said, words
    assert "one step: loss " in said and "of a random LlamaForCausalLM with 2 layers" in said
    assert ("validation loss" in said) == ("data.split=[90,0,10]" not in overrides)
    assert ("buckets" in said) == ("dist=zero3" in overrides)
    assert not (tmp_path / "run").exists()


def test_a_checkpoint_is_as_large_as_was_said(tmp_path: Path, cache_dir: Path, capsys) -> None:
    folder = rehearse(tmp_path, cache_dir, "peft=full")
    written = sum(path.stat().st_size for path in folder.glob("checkpoints/step-1/**/*.safetensors"))
    words = next(line for line in capsys.readouterr().out.splitlines() if "checkpoints" in line)
    assert float(words.split()[1]) == pytest.approx(written / 2**20, rel=0.02) and "1 kept at most" in words


def test_what_only_a_run_would_find_is_raised(tmp_path: Path, cache_dir: Path) -> None:
    with pytest.raises(UserError, match="learns its weights from validation samples"):
        rehearse(tmp_path, cache_dir, "loss=coba", "data.split=[100,0,0]")


def test_targets_that_match_nothing_are_told_before_the_rehearsal(
    tmp_path: Path, cache_dir: Path, monkeypatch: pytest.MonkeyPatch, capsys
) -> None:
    monkeypatch.chdir(tmp_path)
    given = ["debug=fast", f"cache_dir={cache_dir}", two_tasks(tmp_path / "tasks")]
    with pytest.raises(SystemExit) as ended:
        main(["train", *given, "peft.targets=[qproj]", "--dry-run"])
    said = capsys.readouterr()
    assert ended.value.code == 2 and "did you mean q_proj" in said.err and not said.out


def files(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())


@pytest.mark.slow
def test_the_command_leaves_the_token_cache_alone(tmp_path: Path) -> None:
    work = docs_and_code(tmp_path / "work")
    (tmp_path / "tmp").mkdir()
    assert mft(work, "train", *FAST, "tracking=mlflow", "--check")[0] == 0
    before = files(work)
    code, said = mft(work, "train", *FAST, "tracking=mlflow", "--dry-run")
    assert code == 0 and said.startswith("checked: "), said
    assert said.rstrip().endswith("would run; nothing was started") and "one step: loss" in said
    new = [path for path in files(work) if path not in before]
    assert new and all(path.startswith("cache/") for path in new), new


@pytest.mark.slow
@pytest.mark.parametrize(
    ("loss", "sentence"),
    [
        ("Failing", "The rehearsal failed in one step of a tiny model: IndexError: list index out of range"),
        long("Crashing", "The rehearsal was ended by SIGABRT"),
    ],
)
def test_a_loss_that_fails_is_a_sentence(loss: str, sentence: str, tmp_path: Path) -> None:
    work = docs_and_code(tmp_path / "work")
    (work / "myloss").mkdir()
    (work / "myloss" / "__init__.py").write_text(LOSS)
    given = [*FAST, "--plugin", "myloss", f"loss._target_=myloss.{loss}", "--dry-run"]
    code, said = mft(work, "train", *given)
    assert code == 2 and sentence in said and "Traceback" not in said, said
    assert ("myloss/__init__.py:9, share" in said) == (loss == "Failing")
