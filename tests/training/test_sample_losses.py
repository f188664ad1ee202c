"""Losses of single rows: what a line is, that they add up to what is logged, and which files stay."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pandas
import pytest
import torch

import mft.run
from mft.batch import Batch
from mft.loss.base import task_sums
from mft.run_folder import metric_rows
from mft.training.best import BestTracker
from mft.training.sample_losses import SampleLosses, SampleSums, discard_after, read
from mft.training.settings import KeptLosses
from tests.data.conftest import chat
from tests.tiny_runs import logged, stopped_after, train, write_task

ALONE: Any = SimpleNamespace(gather=lambda value: [value], is_main=True, barrier=lambda: None)

OVERSHOOTING = (
    "data.split=[60,20,20]",
    "peft=full",
    "model.fused=false",
    "optimizer.lr=0.3",
    "scheduler=constant",
    "train.max_steps=8",
    "train.eval_every=1",
    "train.eval_samples=null",
    "train.save_every=2",
)
"""The best validation is neither the first nor the last one, and has a checkpoint. At this learning rate the
rounding of a step decides which one it is, so the layers are computed step by step, whose rounding is settled."""


def batch(samples: list[tuple[int, int]], sample_BT: list[list[int]], target_BT: list[list[int]]) -> Batch:
    sample, target = torch.tensor(sample_BT), torch.tensor(target_BT)
    task = torch.tensor([task for task, _ in samples] + [-1])[sample]
    return Batch(target.clamp(0), target, task, sample, torch.zeros_like(sample), tuple(samples))


def written(folder: Path, *sums: SampleSums, kept: KeptLosses = KeptLosses.best) -> SampleLosses:
    """Samples 10 and 11 of a store are parts of one conversation."""
    digests = lambda task, index_N: np.where(index_N == 11, 10, index_N).astype(np.uint64)  # noqa: E731
    losses = SampleLosses(folder, ALONE, ["a", "b [c]"], digests, kept)
    for step, one in enumerate(sums):
        losses.write("valid", step, one)
    return losses


def test_spans_parts_and_repeats_of_a_conversation_are_one_line_of_its_task(tmp_path: Path) -> None:
    sums, nll_BT = SampleSums(), torch.tensor([[1.0, 2.0, 4.0, 8.0, 0.0]])
    first = batch([(1, 10), (0, 10)], [[0, 0, 1, 1, -1]], [[5, -100, 5, 5, -100]])
    second = batch([(1, 11), (1, 3), (1, 10)], [[0, 1, 1, 2, -1]], [[5, 5, 5, 5, -100]])
    for one in (first, second):
        sums.add(torch.where(one.target_BT != -100, nll_BT, 0.0), one)
    written(tmp_path, sums)
    found = read(tmp_path, "valid", 0)
    assert found is not None
    assert found.values.tolist() == [["a", 10, 2, 12.0], ["b [c]", 3, 2, 6.0], ["b [c]", 10, 3, 10.0]]
    assert [str(kind) for kind in found.dtypes] == ["category", "uint64", "int32", "float32"]


def test_a_row_that_is_not_finite_is_one_line_and_the_others_keep_theirs(tmp_path: Path) -> None:
    sums = SampleSums()
    sums.add(torch.tensor([[math.nan, 2.0]]), batch([(0, 1), (0, 2)], [[0, 1]], [[5, 5]]))
    written(tmp_path, sums, SampleSums())
    found, empty = read(tmp_path, "valid", 0), read(tmp_path, "valid", 1)
    assert found is not None and math.isnan(found.loss[0]) and found.loss[1] == 2.0
    assert empty is not None and empty.empty and list(empty) == list(found)


def test_lines_add_up_to_the_sums_of_their_tasks_in_float64() -> None:
    torch.manual_seed(0)
    sums, sums_2K = SampleSums(), torch.zeros(2, 2, dtype=torch.float64)
    for number in range(5):
        samples = [(i % 2, 7 * number + i) for i in range(7)]
        sample_BT = torch.randint(-1, 7, (3, 40))
        target_BT = torch.where((sample_BT >= 0) & (torch.rand(3, 40) < 0.7), 5, -100)
        one = batch(samples, sample_BT.tolist(), target_BT.tolist())
        nll_BT = torch.where(target_BT != -100, 6 * torch.rand(3, 40), 0.0)
        sums.add(nll_BT, one)
        sums_2K += task_sums(nll_BT, one, 2)
    lines = sums.lines(lambda task, index_N: index_N.astype(np.uint64))
    for task in (0, 1):
        here = lines.task_N == task
        assert lines.tokens_N[here].sum() == sums_2K[1, task]
        # the same float32 values added up in float64 in another order: 2^-53 for each of some 200 additions
        assert lines.loss_N[here].sum() == pytest.approx(float(sums_2K[0, task]), rel=1e-13)


@pytest.mark.parametrize("damage", [b"", b"PAR1", None])
def test_a_file_that_is_gone_or_damaged_is_as_if_it_had_not_been_kept(
    tmp_path: Path, damage: bytes | None
) -> None:
    sums = SampleSums()
    sums.add(torch.ones(1, 1), batch([(0, 1)], [[0]], [[5]]))
    losses = written(tmp_path, sums)
    path = tmp_path / "sample_losses" / "valid-0.parquet"
    content = path.read_bytes()
    path.write_bytes(content[: len(content) // 2] if damage is None else damage)
    assert read(tmp_path, "valid", 0) is None
    pandas.DataFrame({"task": ["a"], "row": [1]}).to_parquet(path)  # of somebody else
    assert read(tmp_path, "valid", 0) is None
    shutil.rmtree(path.parent)
    assert read(tmp_path, "valid", 0) is None
    losses.prune(BestTracker())
    discard_after(tmp_path, 0)
    assert not path.parent.exists()


def test_a_disk_that_does_not_take_them_ends_no_training(tmp_path: Path) -> None:
    (tmp_path / "sample_losses").write_text("in the way")
    with pytest.warns(UserWarning, match=r"valid-0\.parquet was not written: .*Training continues"):
        written(tmp_path, SampleSums())


# ── runs ──


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory, cache_dir: Path) -> Path:
    """A run that keeps the rows of all validations."""
    root = tmp_path_factory.mktemp("whole")
    return train(root, cache_dir, *OVERSHOOTING, "train.sample_losses=all")[1]


def files(run: Path) -> set[str]:
    return {path.name for path in (run / "sample_losses").iterdir()}


def lines(run: Path, split: str = "valid", step: int = 0) -> pandas.DataFrame:
    found = read(run, split, step)
    assert found is not None
    return found.astype({"task": str}).set_index(["task", "row"])


def valid(*steps: int) -> set[str]:
    return {f"valid-{step}.parquet" for step in steps}


def assert_close(one: pandas.DataFrame, two: pandas.DataFrame) -> None:
    """The rows and their tokens are equal; the losses to rounding: what a sum in fp32 is added up from
    depends on the shape of the micro-batch, a few units of 2^-24 for each token."""
    assert one.index.equals(two.index) and one.tokens.equals(two.tokens)
    np.testing.assert_allclose(one.loss, two.loss, rtol=1e-5)


@pytest.mark.slow
def test_the_rows_of_a_validation_add_up_to_the_losses_that_are_logged(whole: Path) -> None:
    rows = [row for row in logged(whole) if "valid/loss" in row or "test/loss" in row]
    assert [row["step"] for row in rows] == [*range(9), 8]
    for row in rows:
        split = "test" if "test/loss" in row else "valid"
        found = lines(whole, split, row.get("test/step", row["step"])).groupby("task").sum()
        for name in ("adding", "naming"):
            # float32 in the file: 2^-24 for each row
            mean = float(found.loss[name]) / int(found.tokens[name])
            assert mean == pytest.approx(row[f"{split}/loss/{name}"], rel=1e-6)


@pytest.mark.slow
def test_padded_rows_and_another_batch_size_give_the_same_lines(
    whole: Path, tmp_path: Path, cache_dir: Path
) -> None:
    given = (*OVERSHOOTING, "train.max_steps=1", "train.per_device_eval_batch_size=3")
    _, padded = train(tmp_path, cache_dir, *given, "data=pad")
    assert_close(lines(padded), lines(whole))


@pytest.mark.slow
def test_a_row_has_its_key_in_any_set_of_tasks(whole: Path, tmp_path: Path, cache_dir: Path) -> None:
    other, naming = (
        write_task(tmp_path / "other", 30),
        write_task(tmp_path / "tasks" / "naming", 25, longest=3),
    )
    _, run = train(tmp_path, cache_dir, *OVERSHOOTING, "train.max_steps=1", f"data.paths=[{other},{naming}]")
    assert_close(lines(run).loc[["naming"]], lines(whole).loc[["naming"]])


@pytest.mark.slow
@pytest.mark.parametrize("rows", ["concat", "split_turns", "repeated"])
def test_a_conversation_is_a_line_however_it_is_cut(rows: str, tmp_path: Path, cache_dir: Path) -> None:
    folder = tmp_path / "long"
    folder.mkdir()
    if rows == "concat":
        given = ["data=concat"]
        texts = [{"text": f"{number} " + "word " * 60} for number in range(12)]
    else:
        given = ["data.long_samples=split_turns"]
        texts = [
            chat(*(text for turn in range(5) for text in (f"{number} {turn}?", "it is " * 9)))
            for number in range(12)
        ]
    texts = texts * 2 if rows == "repeated" else texts
    (folder / "rows.jsonl").write_text("".join(json.dumps(text) + "\n" for text in texts))
    _, run = train(
        tmp_path,
        cache_dir,
        *given,
        f"data.paths=[{folder}]",
        "data.split=[50,50,0]",
        "train.max_steps=1",
        "train.eval_samples=null",
    )
    found, report = lines(run), json.loads((run / "report" / "data.json").read_text())["long"]
    assert found.index.is_unique and 0 < len(found) < 12
    samples = report["splits"]["valid"]
    assert samples == len(found) if rows == "concat" else samples > len(found)
    row = next(row for row in logged(run) if "valid/loss" in row)
    assert float(found.loss.sum()) / int(found.tokens.sum()) == pytest.approx(
        row["valid/loss/long"], rel=1e-6
    )


@pytest.mark.slow
def test_the_first_the_best_and_the_last_stay_and_the_best_of_every_checkpoint(
    whole: Path, tmp_path: Path, cache_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Bit-equal to the run that kept all, also stopped and resumed, and gone on with from an earlier step."""
    losses = [row["valid/loss"] for row in logged(whole) if "valid/loss" in row]
    bests = {step: int(np.argmin(losses[: step + 1])) for step in (2, 4, 6, 8)}
    tested = metric_rows(whole / "metrics.jsonl")[0][-1]["test/step"]
    assert len({*bests.values()}) > 1 and bests[8] == tested == 6
    assert files(whole) == valid(*range(9)) | {f"test-{tested}.parquet"}

    with stopped_after(3):
        train(tmp_path, cache_dir, *OVERSHOOTING)
    run = tmp_path / "run"
    (run / "sample_losses" / "valid-5.tmp").write_text("half, as a kill leaves it")
    shutil.copy(run / "sample_losses" / "valid-0.parquet", run / "sample_losses" / "valid-7.parquet")
    train(tmp_path, cache_dir, *OVERSHOOTING)
    kept = valid(0, 8, *bests.values(), int(np.argmin(losses[:4]))) | {f"test-{tested}.parquet"}
    assert files(run) == kept
    for name in kept:
        content = (whole / "sample_losses" / name).read_bytes()
        assert (run / "sample_losses" / name).read_bytes() == content, name

    checkpoint = f"train.resume={run}/checkpoints/step-4"
    with monkeypatch.context() as patch:
        patch.setattr(mft.run, "fit", ended)
        with pytest.raises(Ended):
            train(tmp_path, cache_dir, *OVERSHOOTING, checkpoint)
    assert files(run) == {name for name in kept if int(name.split("-")[1].split(".")[0]) <= 4}
    shutil.rmtree(run / "sample_losses")  # nothing else needs them
    summary, _ = train(tmp_path, cache_dir, *OVERSHOOTING)
    assert summary["test"] == json.loads((whole / "summary.json").read_text())["test"]
    assert files(run) == valid(5, 6, 8) | {f"test-{tested}.parquet"}


class Ended(BaseException):
    """Ends a run in this process where a kill would."""


def ended(t: Any) -> Any:
    raise Ended


@pytest.mark.slow
def test_none_are_kept_where_none_are_wanted(whole: Path, tmp_path: Path, cache_dir: Path) -> None:
    summary, run = train(tmp_path, cache_dir, *OVERSHOOTING, "train.sample_losses=none")
    assert summary["status"] == "finished" and not (run / "sample_losses").exists()
    assert logged(run) == logged(whole)
    assert json.loads((run / "identity.json").read_text()) == json.loads(
        (whole / "identity.json").read_text()
    )


@pytest.mark.slow
def test_probes_of_an_adaptive_loss_leave_no_file(tmp_path: Path, cache_dir: Path) -> None:
    given = ("loss=coba", "loss.warmup_steps=3", "loss.update_interval=1", "train.max_steps=4")
    _, run = train(tmp_path, cache_dir, *given, "train.sample_losses=all", "train.eval_at_start=false")
    assert files(run) == valid(3, 4)
