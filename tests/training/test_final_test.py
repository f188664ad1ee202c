"""The test split is evaluated once, at the end, with the best checkpoint's weights, and chooses nothing."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from mft.commands import show
from mft.comparison.direction import directions
from mft.runs.folders import read_run
from mft.training import final_test, sample_answers
from mft.training.trainer import Trainer
from tests.tiny_runs import logged, stopped_after, train
from tests.training.test_resume import flip
from tests.training.test_sample_losses import OVERSHOOTING, Ended, lines

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory, cache_dir: Path) -> Path:
    """A run of eight steps whose best validation is that of step 6."""
    return train(tmp_path_factory.mktemp("finished"), cache_dir, *OVERSHOOTING)[1]


@pytest.fixture
def run(finished: Path, tmp_path: Path) -> Path:
    """A copy of it."""
    shutil.copytree(finished.parent / "tasks", tmp_path / "tasks", copy_function=shutil.copy2)
    return shutil.copytree(finished, tmp_path / "run")


def summary_of(run: Path) -> dict[str, Any]:
    return json.loads((run / "summary.json").read_text())


def ends(run: Path) -> list[dict[str, Any]]:
    """Returns the last rows of a run's ends in metrics.jsonl."""
    return [row for row in logged(run) if "total/tokens" in row]


def test_the_test_is_a_validation_of_the_best_checkpoint_on_all_test_rows(
    finished: Path, tmp_path: Path, cache_dir: Path
) -> None:
    summary = summary_of(finished)
    step, last = summary["test"]["step"], summary["steps"]
    assert 0 < step == summary["best"]["step"] < last

    def validated(model: Path, out: str) -> dict[str, Any]:
        # the test rows of the run are the validation rows here: the same part of the digests
        given = ("peft=full", "data.split=[80,20,0]", "train.eval_samples=null", "train.max_steps=1")
        return train(tmp_path, cache_dir, *given, "model=auto", f"model.path={model}", out=out)[0]["first"]

    best = validated(finished / "checkpoints" / f"step-{step}", "best")
    assert {f"test/{name[6:]}": loss for name, loss in best.items()} | {"step": step} == summary["test"]
    assert lines(tmp_path / "best").equals(lines(finished, "test", step))
    assert validated(finished / "final", "last")["valid/loss"] != best["valid/loss"]


def test_the_last_row_and_the_summary_say_what_was_the_best_what_was_tested_and_what_it_cost(
    finished: Path, tmp_path: Path, cache_dir: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    summary, rows = summary_of(finished), logged(finished)
    (row,) = ends(finished)
    assert row == rows[-1] and row["step"] == 8
    best = {f"best/{name}": value for name, value in summary["best"].items() if name not in ("by", "value")}
    test = {"test/step" if name == "step" else name: value for name, value in summary["test"].items()}
    total = {f"total/{name}": summary[name] for name in ("tokens", "all_tokens", "trained_tokens", "flops")}
    assert row == {"step": 8} | best | test | total
    assert set(test) == {"test/step", "test/loss", "test/loss/adding", "test/loss/naming"}
    # trained tokens are a part of those that were processed
    trained = sum(value for r in rows for name, value in r.items() if name.startswith("train/tokens/"))
    assert summary["tokens"] > trained > 0 and summary["flops"] > 6 * summary["tokens"] * 10_000
    assert summary["seconds"] > 0
    train(finished.parent, cache_dir, *OVERSHOOTING)
    assert logged(finished) == rows, "a finished run is run again"
    run = read_run(finished)  # the last row is no validation
    assert run.tasks == ["adding", "naming"] and [step for step, _ in run.series("mean")] == [*range(9)]
    assert run.series("test/loss") == [(8, summary["test"]["test/loss"])]
    assert directions(["test/loss/pass"], run.tasks) == {"test/loss/pass": False}
    capsys.readouterr()
    show.command([str(finished)])
    said = " ".join(capsys.readouterr().out.split())
    assert "Validation and test loss per task" in said and "test at step 6" in said
    assert f"{summary['test']['test/loss/naming']:.3f}" in said


def test_a_test_that_was_killed_is_made_when_the_run_is_resumed(
    finished: Path, tmp_path: Path, cache_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch, pytest.raises(Ended):
        patch.setattr(final_test, "evaluate", killed)
        train(tmp_path, cache_dir, *OVERSHOOTING)
    run = tmp_path / "run"
    assert (run / "final").is_dir() and not (run / "summary.json").exists() and not ends(run)
    summary, _ = train(tmp_path, cache_dir, *OVERSHOOTING)
    assert summary["test"] == summary_of(finished)["test"] and logged(run) == logged(finished)
    assert summary["tokens"] == summary_of(finished)["tokens"]
    (run / "summary.json").unlink()  # killed after the last row was logged
    train(tmp_path, cache_dir, *OVERSHOOTING)
    assert logged(run) == logged(finished)


def killed(t: Trainer, run_dir: Path) -> Any:
    raise Ended


def test_so_is_that_of_a_run_that_was_stopped_early_at_the_step_it_ended_at(
    tmp_path: Path, cache_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    given = (*OVERSHOOTING, "train.early_stopping=true", "train.early_stopping_stall_num=2")
    whole, folder = train(tmp_path, cache_dir, *given, out="whole")
    assert whole["steps"] < 8 and whole["test"]["step"] == whole["best"]["step"] < whole["steps"]
    with monkeypatch.context() as patch, pytest.raises(Ended):
        patch.setattr(final_test, "evaluate", killed)
        train(tmp_path, cache_dir, *given)
    again, run = train(tmp_path, cache_dir, *given)
    assert (again["steps"], again["test"]) == (whole["steps"], whole["test"])
    assert logged(run) == logged(folder)
    longer, _ = train(tmp_path, cache_dir, *given, "train.max_steps=20")
    assert longer["steps"] > whole["steps"] and len(ends(run)) == 1


@pytest.mark.parametrize("step", [4, 6])
def test_what_is_tested_does_not_depend_on_a_stop(
    finished: Path, step: int, tmp_path: Path, cache_dir: Path
) -> None:
    """The best validation is that of step 6, which a run that saves every fourth step has only by a stop."""
    given = (*OVERSHOOTING, "train.save_every=4")
    whole, folder = train(tmp_path, cache_dir, *given, out="whole")
    assert whole["best"]["step"] == 6 and whole["test"]["step"] in (4, 8)
    with stopped_after(step):
        assert train(tmp_path, cache_dir, *given)[0]["status"] == "stopped"
    again, run = train(tmp_path, cache_dir, *given)
    assert again["test"] == whole["test"] and logged(run) == logged(folder)


def test_an_extended_run_is_tested_again_and_counts_all_its_tokens(
    run: Path, tmp_path: Path, cache_dir: Path
) -> None:
    longer = (*OVERSHOOTING, "train.max_steps=10")
    whole, folder = train(tmp_path, cache_dir, *longer, out="whole")
    summary, _ = train(tmp_path, cache_dir, *longer)
    assert (summary["steps"], summary["tokens"], summary["test"]) == (10, whole["tokens"], whole["test"])
    assert logged(run)[-1]["step"] == 10 and logged(run) == logged(folder)


def test_nothing_is_tested_without_test_rows(tmp_path: Path, cache_dir: Path) -> None:
    summary, run = train(tmp_path, cache_dir)
    assert summary["test"] == {} and not list((run / "sample_losses").glob("test-*"))
    (row,) = ends(run)
    assert not any(name.startswith("test/") for name in row) and "best/valid/loss" in row


def test_a_run_without_validation_tests_its_last_weights(tmp_path: Path, cache_dir: Path) -> None:
    summary, run = train(tmp_path, cache_dir, "data.split=[80,0,20]", "train.save_every=1")
    assert summary["test"]["step"] == 3 and summary["first"] == {} and "test/loss/adding" in summary["test"]
    splits = [task["splits"] for task in json.loads((run / "report" / "data.json").read_text()).values()]
    # every row, though a validation would take train.eval_samples=4 of each task
    assert len(lines(run, "test", 3)) == sum(split["test"] for split in splits) > 8
    assert {name for name in ends(run)[0] if name.startswith("best/")} == set()


def test_the_answers_after_training_are_those_of_the_final_weights(
    tmp_path: Path, cache_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    order: list[str] = []

    def noted(name: str, call: Callable[..., Any]) -> Callable[..., Any]:
        def calling(*arguments: Any) -> Any:
            order.append(name)
            return call(*arguments)

        return calling

    monkeypatch.setattr(sample_answers.Answers, "ask", noted("ask", sample_answers.Answers.ask))
    monkeypatch.setattr(final_test, "evaluate", noted("test", final_test.evaluate))
    prompts = tmp_path / "prompts.jsonl"
    turns = [{"role": "human", "content": "what comes next?"}, {"role": "bot", "content": "it is 3"}]
    prompts.write_text(json.dumps({"chat_rounds": turns}) + "\n")
    train(
        tmp_path, cache_dir, f"train.prompts={prompts}", "train.prompts_max_new_tokens=1", "train.max_steps=1"
    )
    assert order == ["ask", "ask", "test"]


def test_a_weight_that_is_packed_to_4_bits_costs_what_it_costs_unpacked(
    tmp_path: Path, cache_dir: Path
) -> None:
    runs = [
        train(
            tmp_path, cache_dir, f"peft={peft}", "train.max_steps=1", "train.eval_at_start=false", out=peft
        )[0]
        for peft in ("lora", "qlora")
    ]
    assert runs[0]["flops"] == runs[1]["flops"] > 0


def test_a_damaged_best_checkpoint_is_told_of_and_not_tested(
    run: Path, cache_dir: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    flip(run / "checkpoints" / "step-6" / "state" / "shard-0.safetensors")
    (run / "summary.json").unlink()
    summary, _ = train(run.parent, cache_dir, *OVERSHOOTING)
    said = " ".join(capsys.readouterr().out.split())
    assert "the test split is not evaluated: step-6, the best, is damaged: state/shard-0.safetensors" in said
    assert summary["status"] == "finished" and summary["test"] == {}
