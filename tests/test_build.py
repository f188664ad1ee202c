"""What the check of a whole config refuses before any process starts or model loads."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from mft.build import check, check_validation
from mft.compose import compose_resolved
from mft.config import Train
from mft.errors import UserError
from mft.loss.coba import Coba
from mft.loss.mean import TaskTokenMean
from tests.loss.modes import MODES, made


@pytest.fixture
def rows(tmp_path: Path) -> Path:
    turns = [{"role": "human", "content": "a"}, {"role": "bot", "content": "b"}]
    for name in ("naming", "checking"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "rows.jsonl").write_text(json.dumps({"chat_rounds": turns}) + "\n")
    return tmp_path


def checked(rows: Path, *overrides: str) -> None:
    check(compose_resolved(["model=tiny", f"cache_dir={rows}", *overrides]), world=1)


def test_what_needs_validation_is_refused_where_there_is_none(rows: Path) -> None:
    without = (f"data.paths=[{rows / 'naming'}]", "data.split=[100,0,0]")
    for mode in ("coba", "self_paced", "famo_valid"):
        with pytest.raises(UserError, match=r"loss=\w+ learns its weights from validation samples.*data\.split"):
            checked(rows, *without, f"loss={mode}")
    with pytest.raises(UserError, match=r"train\.early_stopping=true needs validation samples"):
        checked(rows, *without, "train.early_stopping=true")
    with pytest.raises(UserError, match=r"train\.best=naming: this task has no validation samples"):
        checked(rows, *without, "train.best=naming")
    checked(rows, *without, "loss=famo")


def test_a_tasks_own_validation_rows_are_enough(rows: Path) -> None:
    named = ("+task.naming._target_=mft.data.task.Task", f"+task.naming.paths=[{rows / 'naming'}]")
    checked(rows, *named, f"+task.naming.valid=[{rows / 'checking'}]", "data.split=[100,0,0]", "loss=coba")


def test_counted_samples_are_judged_by_the_same_rule() -> None:
    check_validation(Train(best="a"), Coba(), {"a": 3, "b": 0})
    with pytest.raises(UserError, match=r"train\.best=b"):
        check_validation(Train(best="b"), TaskTokenMean(), {"a": 3, "b": 0})
    with pytest.raises(UserError, match="loss=coba"):
        check_validation(Train(), Coba(), {"a": 0, "b": 0})


@pytest.mark.parametrize(
    "setting",
    [
        "epochs=inf",
        "max_grad_norm=0",
        "max_grad_norm=-1",
        "max_grad_norm=nan",
        "peak_tflops=-1",
        "prompts_max_new_tokens=0",
        "seed=-1",
        "seed=99999999999999999999",
        "early_stopping_stall_num=0",
        "prompts=/nowhere.jsonl",
    ],
)
def test_settings_no_run_could_work_with_are_refused(rows: Path, setting: str) -> None:
    key = setting.partition("=")[0]
    with pytest.raises(UserError, match=rf"^train\.{key}="):
        checked(rows, f"data.paths=[{rows / 'naming'}]", f"train.{setting}")


@pytest.mark.parametrize("mode", MODES)
def test_modes_that_need_validation_are_those_that_probe(mode: str) -> None:
    loss = made(mode)
    assert loss.needs_validation == loss.wants_probe(1)


def own_task(rows: Path, name: str, text: str) -> str:
    """Writes the yaml of a task with these lines; returns the override that chooses it."""
    (rows / "conf" / "task").mkdir(parents=True, exist_ok=True)
    head = f"# @package task.{name}\n_target_: mft.data.task.Task\npaths: [{rows / 'naming'}]\n"
    (rows / "conf" / "task" / f"{name}.yaml").write_text(head + text)
    return f"task=[{name}]"


def composed(rows: Path, *overrides: str) -> Any:
    return compose_resolved(["model=tiny", f"cache_dir={rows}", *overrides], [rows / "conf"])


def test_every_field_of_a_task_can_be_set_where_its_yaml_leaves_it_out(rows: Path) -> None:
    choice = own_task(rows, "z", "format: chat\n")
    given = ("task.z.weight=2", "task.z.share=1", "task.z.hint=none", "task.z.name=zed", f"task.z.valid=[{rows}]")
    cfg = composed(rows, choice, *given, "data.mixture=shares", f"task.z.valid=[{rows / 'checking'}]")
    check(cfg, world=1)
    assert (cfg.task.z.weight, cfg.task.z.name, list(cfg.task.z.valid)) == (2, "zed", [str(rows / "checking")])


@pytest.mark.parametrize(
    ("override", "says"),
    [
        ("task.z.wieght=2", r"task\.z\.wieght: Task has no such field; did you mean weight\?"),
        ("task.zz.weight=2", r"task\.zz\.weight: no task 'zz' is chosen.*Chosen: z;"),
        ("task.naming.weight=2", r"a folder of data\.paths has no settings of its own"),
        ("task.z.weight=nan", r"task\.z\.weight=nan: must be a finite number"),
        ("task.z.weight=-1", r"task\.z\.weight=-1: must be"),
        ("task.z.weight=0", r"task\.z\.weight: all are 0, so nothing would be trained"),
        ("task.z.valid=x", r"task\.z\.valid='x': must be a list, e\.g\. \[a,b\]"),
        ("task.z.format=mesages", r"task\.z\.format='mesages': unknown format; did you mean messages\?"),
    ],
)
def test_a_wrong_field_of_a_task_is_one_sentence(rows: Path, override: str, says: str) -> None:
    choice = own_task(rows, "z", "format: chat\n")
    with pytest.raises(UserError, match=says):
        check(composed(rows, choice, override), world=1)


def test_a_weight_of_zero_is_refused_only_where_nothing_else_trains(rows: Path) -> None:
    own_task(rows, "y", "")
    own_task(rows, "z", "")
    two = ("task=[y,z]", "data.mixture=shares")
    check(composed(rows, *two, "task.z.weight=0"), world=1)
    check(composed(rows, *two, "task.z.share=0"), world=1)
    with pytest.raises(UserError, match=r"task\.y\.weight, task\.z\.weight: all are 0"):
        check(composed(rows, *two, "task.y.weight=0", "task.z.weight=0"), world=1)
    with pytest.raises(UserError, match=r"task\.z\.weight: all are 0"):
        check(composed(rows, *two, "task.y.share=0", "task.z.weight=0"), world=1)
    with pytest.raises(UserError, match=r"task\.y\.share, task\.z\.share: all are 0"):
        check(composed(rows, *two, "task.y.share=0", "task.z.share=0"), world=1)
