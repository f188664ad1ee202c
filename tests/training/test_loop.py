"""What the loop decides: steps it may not apply, which validation is the best, when to stop, what is kept."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from mft.errors import UserError
from mft.hardware import quiet_libraries
from mft.launch import job
from mft.model.tiny import Tiny
from mft.training.checkpoint import complete_steps
from mft.training.loop import fit
from mft.training.trainer import Trainer
from tests.loss.loop import Layout, Recorder, Stage, write_tasks
from tests.loss.modes import made
from tests.tiny_runs import logged, train

pytestmark = pytest.mark.slow

POISON = "Z"
"""A letter that no other row holds; its embedding is NaN, so that a sample with it has no finite loss."""


@pytest.fixture(scope="module")
def poisoned(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return poisoned_model(tmp_path_factory.mktemp("poisoned"))


def poisoned_model(root: Path) -> Path:
    """Makes a tiny model with a head of its own (a tied one would hand the NaN to every logit)."""
    tiny = Tiny(cache_dir=str(root / "cache"), tied=False, layers=1)
    folder = shutil.copytree(tiny.folder(), root / "poisoned")
    weights = load_file(folder / "model.safetensors")
    (token,) = tiny.tokenizer()(POISON).input_ids
    weights["model.embed_tokens.weight"][token] = math.nan
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def odd_task(folder: Path, rows: int = 20, bad: tuple[int, ...] = (4, 11, 16)) -> Path:
    """Writes a task whose rows at these places (from 0) hold the poison."""
    folder.mkdir(parents=True)
    with (folder / "rows.jsonl").open("w", encoding="utf-8") as file:
        for row in range(rows):
            answer = f"it is {POISON if row in bad else row}"
            turns = [{"role": "human", "content": f"{row}?"}, {"role": "bot", "content": answer}]
            file.write(json.dumps({"chat_rounds": turns}) + "\n")
    return folder


def settings(model: Path, task: Path) -> list[str]:
    """One epoch of 10 steps of two samples, nothing but training."""
    return [
        "model=auto",
        f"model.path={model}",
        "data=pad",
        "data.split=[100,0,0]",
        f"data.paths=[{task}]",
        "train.max_steps=10",
        "train.save_every=null",
        "optimizer.lr=1e-3",
        "train.resume=never",
    ]


def test_weights_that_the_last_step_spoilt_are_not_saved(tmp_path: Path, cache_dir: Path) -> None:
    with pytest.raises(UserError, match=r"after step 1 has no finite loss for any task"):
        train(tmp_path, cache_dir, "train.max_steps=1", "optimizer.lr=1e30")
    run_dir = tmp_path / "run"
    assert json.loads((run_dir / "summary.json").read_text())["status"] == "failed"
    assert not (run_dir / "final").exists() and not complete_steps(run_dir / "checkpoints")


@pytest.mark.filterwarnings("ignore:Step")
def test_non_finite_steps_are_passed_over_and_counted(
    poisoned: Path, tmp_path: Path, cache_dir: Path
) -> None:
    given = settings(poisoned, odd_task(tmp_path / "odd"))
    with pytest.warns(UserWarning, match=r"task odd, \S*rows\.jsonl:(5|12|17)\. .*Skipped, 1 of 5"):
        summary, run_dir = train(tmp_path, cache_dir, *given, "train.skip_nonfinite_steps=5")
    rows = [row for row in logged(run_dir) if "train/loss" in row]
    skipped = [row for row in rows if row.get("train/skipped_steps")]
    assert summary["status"] == "finished" and len(rows) == 10
    assert summary["skipped_steps"] == len(skipped) == 3
    assert all(
        row["train/skipped_steps"] == 1 and math.isnan(row["train/loss"] or math.nan) for row in skipped
    )
    assert all(math.isfinite(row["train/loss"]) for row in rows if row not in skipped)
    final = load_file(run_dir / "final" / "adapter_model.safetensors")
    assert all(bool(torch.isfinite(value).all()) for value in final.values())


@pytest.mark.filterwarnings("ignore:Step")
def test_one_more_than_allowed_ends_the_run_with_step_task_and_samples(
    poisoned: Path, tmp_path: Path, cache_dir: Path
) -> None:
    given = settings(poisoned, odd_task(tmp_path / "odd"))
    steps = []
    for allowed in (0, 2):
        with pytest.raises(
            UserError, match=r"Step \d+ .*not applied.*task odd, \S*rows\.jsonl:(5|12|17)\."
        ) as told:
            train(tmp_path, cache_dir, *given, f"train.skip_nonfinite_steps={allowed}", out=f"skip{allowed}")
        steps.append(int(str(told.value).split()[1]))
        summary = json.loads((tmp_path / f"skip{allowed}" / "summary.json").read_text())
        assert summary["status"] == "failed" and f"Step {steps[-1]} " in summary["error"]
    assert steps[0] < steps[1]


def decided(rows: list[dict[str, Any]], judged: list[float], patience: int) -> tuple[int, float, int]:
    """Returns the best step, its value and the last step: `patience` validations without a new best end the
    run."""
    best, at, stalled = math.inf, 0, 0
    for row, value in zip(rows, judged, strict=True):
        best, at, stalled = (value, row["step"], 0) if value < best else (best, at, stalled + 1)
        if stalled >= patience:
            return at, best, row["step"]
    return at, best, rows[-1]["step"]


TASKS = {"adding": 3.0, "naming": 1.0}
JUDGES = {
    "mean": lambda adding, naming: (adding + naming) / 2,
    "worst": max,
    "weighted": lambda adding, naming: (3 * adding + naming) / 4,
    "naming": lambda adding, naming: naming,
}


@pytest.mark.parametrize("best", JUDGES)
def test_best_and_early_stopping_follow_what_was_asked(best: str, tmp_path: Path, cache_dir: Path) -> None:
    named = [f"+task.{name}._target_=mft.data.task.Task" for name in TASKS]
    named += [f"+task.{name}.paths=[{tmp_path / 'tasks' / name}]" for name in TASKS]
    named += [f"+task.{name}.weight={weight}" for name, weight in TASKS.items()]
    summary, run_dir = train(
        tmp_path,
        cache_dir,
        *named,
        "data.paths=[]",
        f"train.best={best}",
        "peft=full",
        "optimizer.lr=3e-2",  # falls, then overshoots: the tasks' best steps differ
        "scheduler=constant",
        "train.max_steps=16",
        "train.eval_every=1",
        "train.save_every=null",
        "train.keep=1",
        "train.keep_task_best=true",
        "train.early_stopping=true",
        "train.early_stopping_stall_num=3",
    )
    rows = [row for row in logged(run_dir) if "valid/loss" in row]
    losses = [[row[f"valid/loss/{name}"] for name in TASKS] for row in rows]
    judged = [JUDGES[best](*pair) for pair in losses]
    step, value, last = decided(rows, judged, patience=3)
    assert summary["best"]["by"] == best and summary["best"]["step"] == step
    assert summary["best"]["value"] == pytest.approx(value, rel=1e-12) == job.objective(summary)
    assert summary["steps"] == last == rows[-1]["step"]
    assert last < 16, "the run is meant to be stopped early"
    if best in ("worst", "weighted"):
        assert [row[f"valid/{best}"] for row in rows] == pytest.approx(judged, rel=1e-12)
    kept = complete_steps(run_dir / "checkpoints")
    assert Path(summary["best_checkpoint"]).name == f"step-{step}" and step in kept
    for number, name in enumerate(TASKS):
        own = [pair[number] for pair in losses]
        found = summary["best_by_task"][name]
        assert found["valid/loss"] == min(own) and found["step"] == rows[own.index(min(own))]["step"]
        if found["step"]:  # the start is validated, not saved
            assert Path(found["checkpoint"]).name == f"step-{found['step']}" and found["step"] in kept
    assert set(kept) <= {step, last, *(summary["best_by_task"][name]["step"] for name in TASKS)}


def test_the_routers_loss_is_logged_by_itself_as_a_mean_over_micro_batches(
    tmp_path: Path, cache_dir: Path
) -> None:
    torch.manual_seed(0)
    config = transformers.MixtralConfig(
        hidden_size=64,
        intermediate_size=64,
        num_hidden_layers=1,
        num_attention_heads=4,
        num_key_value_heads=2,
        num_local_experts=4,
        vocab_size=512,
        pad_token_id=1,
        bos_token_id=None,
        eos_token_id=0,
    )
    folder = tmp_path / "mixtral"
    transformers.MixtralForCausalLM(config).save_pretrained(folder)
    Tiny(cache_dir=str(cache_dir)).tokenizer().save_pretrained(folder)
    given = [
        "model=auto",
        f"model.path={folder}",
        "peft=full",
        "train.max_steps=1",
        "train.per_device_batch_size=2",
    ]
    rows = {}
    for coefficient, accumulation in ((0.0, 1), (0.5, 1), (0.5, 4)):
        _, run_dir = train(
            tmp_path,
            cache_dir,
            *given,
            f"model.router_coef={coefficient}",
            f"train.gradient_accumulation_steps={accumulation}",
            out=f"router-{coefficient}-{accumulation}",
        )
        rows[coefficient, accumulation] = next(row for row in logged(run_dir) if "train/loss" in row)
    assert "train/router" not in rows[0.0, 1]
    # two of four experts for each token: 2 where all are equally busy, a little more where they are not
    assert 0.5 * 2 <= rows[0.5, 1]["train/router"] < 0.5 * 2.5
    assert rows[0.5, 1]["train/loss"] == pytest.approx(rows[0.0, 1]["train/loss"], rel=1e-6)
    assert rows[0.5, 4]["train/router"] == pytest.approx(rows[0.5, 1]["train/router"], rel=0.1)


class Overflowing:
    """A stage of tests.loss in fp16, on the CPU, whose loss scaler starts so high that gradients overflow
    once."""

    def __init__(self, root: Path, backend: str):
        write_tasks(root / "tasks")
        self.stage = Stage(root, Layout(2, packed=False, backend=backend))
        accelerator = self.stage.engine.accelerator
        # accelerate makes a scaler on GPUs only; torch's works on a CPU, so the path is walked here by giving
        # it one
        accelerator.state._mixed_precision, accelerator.native_amp = "fp16", True
        accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**60, backoff_factor=2.0**-54)

    def fit(self, poison: bool = False) -> tuple[Trainer, Recorder]:
        recorder = Recorder()
        t = self.stage.training(made("lbtw"), recorder, fused=True)  # as optimizer=adamw is
        if poison:
            t.module.model.get_input_embeddings().weight.data[65:90] = math.nan
        self.before = self.stage.parameters(t)
        fit(t)
        return t, recorder


@pytest.fixture(params=["single", "ddp", "fsdp"])
def overflowing(tmp_path: Path, request: pytest.FixtureRequest) -> Iterator[Overflowing]:
    quiet_libraries()
    found = Overflowing(tmp_path, request.param)
    yield found
    found.stage.engine.close()


def test_an_overflow_that_the_loss_scaler_answers_is_no_error_and_no_update(overflowing: Overflowing) -> None:
    t, recorder = overflowing.fit()
    skipped = [bool(row.get("train/skipped_steps")) for _, row in sorted(recorder.rows.items())]
    assert skipped == [True, False, False, False] and t.state.skipped == 0
    assert (
        "train/weight/a" not in recorder.rows[1]
    )  # the mode learnt nothing from a step that was not applied
    assert not torch.equal(overflowing.before, overflowing.stage.parameters(t))


@pytest.mark.parametrize("overflowing", ["single"], indirect=True)
def test_with_a_loss_scaler_too_a_loss_that_is_not_finite_ends_the_run(overflowing: Overflowing) -> None:
    with pytest.raises(UserError, match=r"Step 1 has a non-finite loss.*task [abc], "):
        overflowing.fit(poison=True)
