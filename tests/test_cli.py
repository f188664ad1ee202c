"""The command as a person types it."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from mft import cli
from tests.tiny_runs import train, two_tasks


def run(*args: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "mft.cli", *args]
    return subprocess.run(command, capture_output=True, text=True, timeout=300)


def test_help_and_version_import_nothing_heavy() -> None:
    code = """
import sys
from mft.cli import main
main(["--help"]); main(["train", "--help"]); main(["--version"])
heavy = {"torch", "transformers", "hydra", "mlflow", "peft"} & set(sys.modules) - {"hydra"}
assert not heavy, heavy
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert "mft train" in done.stdout and "task_token_mean" in done.stdout


@pytest.mark.parametrize(
    "args, parts",
    [
        (["trian"], ["'trian'", "did you mean train?"]),
        (["train", "--mutlirun"], ["--mutlirun", "did you mean --multirun?"]),
        (["train", "peft"], ["'peft'", "did you mean peft=…?"]),
        (
            ["generate", "somewhere", "hi", "max_new_token=3"],
            ["max_new_token", "did you mean --max-new-tokens?"],
        ),
        (["generate", "somewhere", "hi", "--top-p", "much"], ["--top-p needs a number", "'much'"]),
        (["generate", "somewhere"], ["at least one prompt"]),
        (["generate", "somewhere", "hi", "--max-new-tokens", "0"], ["max_new_tokens=0", "at least 1"]),
        (["generate", "somewhere", "hi", "--temperature=0"], ["temperature=0.0", "--do-sample false"]),
        (["generate", "somewhere", "hi", "--num-beams", "-1"], ["num_beams=-1", "at least 1"]),
        (
            ["generate", "somewhere", "hi", "--repetition-penalty", "nan"],
            ["repetition_penalty=nan", "greater than 0"],
        ),
        (["generate", "somewhere", "hi", "--top_p", "1.5"], ["top_p=1.5", "at most 1"]),
        (["merge", "one", "two"], ["one run folder", "one two"]),
        (["merge", "--base", "x"], ["--adapter", "--out"]),
        (["merge", "no/such/run"], ["no/such/run", "not a folder"]),
        (["demo", "now"], ["takes no arguments"]),
    ],
)
def test_a_wrong_command_line_gets_a_sentence(
    args: list[str], parts: list[str], capsys: pytest.CaptureFixture
) -> None:
    with pytest.raises(SystemExit) as caught:
        cli.main(args)
    assert caught.value.code in (1, 2)
    text = capsys.readouterr().err
    assert text.startswith("mft: ") and text.count("\n") == 1
    assert all(part in text for part in parts), text


def test_cfg_job_prints_the_composed_config() -> None:
    done = run("train", "debug=fast", "peft=qlora", "--cfg", "job")
    assert done.returncode == 0, done.stderr
    assert "quant_type: nf4" in done.stdout and "max_steps: 3" in done.stdout


@pytest.mark.slow
def test_generate_and_merge_a_run(tmp_path: Path, cache_dir: Path, capsys: pytest.CaptureFixture) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    _, run_dir = train(tmp_path, cache_dir, "optimizer.lr=1e-2", "train.max_steps=6")
    cli.main(["generate", str(run_dir), "what comes next?", "--max-new-tokens", "4", "--do-sample", "false"])
    capsys.readouterr()
    cli.main(["merge", str(run_dir)])
    assert str(run_dir / "merged") in capsys.readouterr().out
    merged = AutoModelForCausalLM.from_pretrained(run_dir / "merged")
    tokenizer = AutoTokenizer.from_pretrained(run_dir / "merged")
    turns = [{"role": "user", "content": "hi"}]
    text = tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
    assert text == "<s>human\nhi<s>bot\n"
    assert torch.isfinite(merged(torch.tensor([[1, 2, 3]])).logits).all()


def test_generate_with_a_base_that_has_moved(
    tmp_path: Path, cache_dir: Path, tiny_folder: Path, capsys: pytest.CaptureFixture
) -> None:
    base = shutil.copytree(tiny_folder, tmp_path / "base")
    given = ["model=auto", f"model.path={base}", "peft=lora", "train.max_steps=1"]
    _, run_dir = train(tmp_path, cache_dir, *given)
    asked = ["generate", str(run_dir), "what comes next?", "--max-new-tokens", "4", "--do-sample", "false"]
    capsys.readouterr()
    cli.main(asked)
    answer = capsys.readouterr().out
    moved = base.rename(tmp_path / "moved")
    with pytest.raises(SystemExit):
        cli.main(asked)
    assert "give another with --base" in capsys.readouterr().err
    cli.main([*asked, "--base", str(moved)])
    assert capsys.readouterr().out == answer
    with pytest.raises(SystemExit):
        cli.main(["generate", str(moved), "hi", "--base", str(moved)])
    assert "chat template" in capsys.readouterr().err  # a plain base: how to ask is not known
    cli.main(["merge", str(run_dir), "--base", str(moved)])
    with pytest.raises(SystemExit):
        cli.main(["generate", str(run_dir / "merged"), "hi", "--base", str(moved)])
    assert "holds a full model, which needs no base; leave it out" in capsys.readouterr().err


@pytest.mark.slow
def test_train_as_a_command_in_worker_processes(tmp_path: Path, cache_dir: Path) -> None:
    common = ["train", "debug=fast", f"cache_dir={cache_dir}", two_tasks(tmp_path / "tasks")]
    done = run(*common, f"output_dir={tmp_path / 'run'}")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "step 3/3" in done.stdout and "mft generate" in done.stdout
    assert "Traceback" not in done.stderr and "Warning" not in done.stderr, done.stderr
