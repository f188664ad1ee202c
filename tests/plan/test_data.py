"""Tokens and steps by task: counted where that is quick or was done before, else about."""

from __future__ import annotations

import gzip
from pathlib import Path

import pytest

from mft.data.cache import fingerprint
from mft.plan import data
from mft.plan.case import Case, case, composed
from mft.plan.data import DataPlan, data_plan
from mft.plan.gpus import device
from tests.plan.configs import config_alone
from tests.tiny_runs import train, two_tasks, write_task


def of(cache_dir: Path, *overrides: str) -> Case:
    given = [
        "debug=fast",
        f"cache_dir={cache_dir}",
        "data.seq_length=128",
        "train.precision=fp32",
        *overrides,
    ]
    return case(composed(given), device("H100"))


def planned(case: Case) -> DataPlan:
    found = data_plan(case)
    assert found is not None
    return found


def test_without_tasks_there_is_nothing_to_count(cache_dir: Path) -> None:
    assert data_plan(of(cache_dir)) is None


@pytest.mark.slow
def test_small_data_are_counted_as_the_run_counts_them(tmp_path: Path, cache_dir: Path) -> None:
    tasks = two_tasks(tmp_path / "tasks")
    settings = [
        "data.seq_length=128",
        "train.max_steps=null",
        "train.epochs=2",
        "train.per_device_batch_size=2",
    ]
    found = planned(of(cache_dir, tasks, *settings))
    summary, _ = train(tmp_path, cache_dir, *settings, "train.eval_every=null", "train.save_every=null")
    assert not found.about and found.steps == summary["total_steps"]
    assert found.tokens == pytest.approx(summary["tokens"], rel=0.02)  # epochs are told to four digits
    assert [task.name for task in found.tasks] == ["adding", "naming"]
    assert sum(task.steps for task in found.tasks) == pytest.approx(found.steps)
    assert 0 < found.trained < found.tokens


def test_large_data_are_estimated_by_their_first_rows(
    tmp_path: Path, cache_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fingerprint, "YOUNG_SECONDS", 0.0)  # the test does not wait until its rows are older
    task = f"data.paths=[{write_task(tmp_path / 'adding', 2000)}]"
    counted = planned(of(cache_dir, task, "train.max_steps=null"))
    monkeypatch.setattr(data, "QUICK", 1000)
    kept = planned(of(cache_dir, task, "train.max_steps=null"))
    assert not kept.about and kept.tasks == counted.tasks  # they were tokenised before
    estimated = planned(of(tmp_path / "cache", task, "train.max_steps=null"))
    assert estimated.about and not (tmp_path / "cache" / "tokens").exists()
    assert estimated.tokens == pytest.approx(counted.tokens, rel=0.1)
    assert estimated.trained == pytest.approx(counted.trained, rel=0.1)
    assert estimated.steps == pytest.approx(counted.steps, rel=0.1)


def test_compressed_rows_are_more_than_their_bytes(tmp_path: Path, cache_dir: Path) -> None:
    rows = (write_task(tmp_path / "plain", 300) / "rows.jsonl").read_bytes()
    (tmp_path / "packed").mkdir()
    (tmp_path / "packed" / "rows.jsonl.gz").write_bytes(gzip.compress(rows))
    found = planned(of(cache_dir, f"data.paths=[{tmp_path / 'packed'}]"))
    assert found.about and 100 < found.tasks[0].samples < 900  # of 285


def test_without_a_tokenizer_characters_are_counted(tmp_path: Path, cache_dir: Path) -> None:
    model = config_alone(tmp_path / "model")
    task = write_task(tmp_path / "adding", 100)
    given = [f"model.path={model}", f"data.paths=[{task}]", f"cache_dir={cache_dir}", "tracking=none"]
    found = planned(case(composed(given), device("H100")))
    assert found.about and found.source == "estimated, 4 characters a token"
    assert 0 < found.trained < found.tokens


def test_shares_of_a_mixture_and_a_limit_count_in_an_estimate(
    tmp_path: Path, cache_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(data, "QUICK", 0)
    tasks, steps = two_tasks(tmp_path / "tasks"), "train.max_steps=null"
    natural = planned(of(tmp_path / "cache", tasks, steps))
    equal = planned(
        of(tmp_path / "cache", tasks, steps, "data.mixture=temperature", "data.mixture_temperature=100")
    )
    assert [task.epochs for task in natural.tasks] == pytest.approx([natural.tasks[0].epochs] * 2)
    assert equal.tasks[1].epochs > natural.tasks[1].epochs > equal.tasks[0].epochs - 3
    few = planned(of(tmp_path / "cache", tasks, steps, "data.limit=5"))
    assert [task.samples for task in few.tasks] == [5, 5]


def test_longer_samples_are_a_part_of_all(cache_dir: Path, tmp_path: Path) -> None:
    found = planned(of(cache_dir, f"data.paths=[{write_task(tmp_path / 'adding', 60)}]"))
    shares = [found.longer(length) for length in (1, 40, 10_000)]
    assert shares[0] == 1 and 0 < shares[1] < 1 and shares[2] == 0
