"""Searches by Optuna over real tiny trainings: six trials, one of them failing, gone on with by the same
command."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from mft import cli, run_folder
from mft.errors import UserError
from mft.files.json_file import read_json
from mft.sweep.search_space import boundary_trials, distribution, split
from tests.sweeping import FAST, mft, runs, start, two_tasks, until, until_nothing_runs

pytest.importorskip("optuna")

SPACE = ["optimizer.lr=tag(log,interval(1e-4,1e-2))", "peft.rank=choice(2,4)", "hydra.sweeper.params=null"]
SEARCH = [
    "train",
    "-m",
    "experiment=search",
    *FAST,
    "loss.tau=3",
    "train.best=worst",
    "launch.jobs=2",
    *SPACE,
]


def found(work: Path) -> dict[str, Any]:
    (path,) = work.glob("multirun/*/*/search.json")
    return json.loads(path.read_text())


@pytest.mark.slow
def test_six_trials_then_more_by_the_same_command(tmp_path: Path) -> None:
    work = two_tasks(tmp_path)
    startup = ["hydra.sweeper.startup_trials=2"]
    code, said = mft(work, *SEARCH, *startup, "hydra.sweeper.n_trials=4")
    assert code == 0, said
    before = {run.name: (run / "summary.json").stat().st_mtime for run in runs(work)}
    trials = found(work)["trials"]
    assert len(trials) == 4 and all(trial["state"] == "complete" for trial in trials)
    wider = [*SEARCH, *startup, "hydra.sweeper.n_trials=6"]
    search = start(work, *wider)
    until(lambda: len(runs(work)) > 4, search)
    search.kill()  # in the middle of the fifth or sixth
    search.communicate(timeout=60)
    until_nothing_runs(work)
    code, said = mft(work, *wider)
    assert code == 0, said
    result = found(work)
    assert len(result["trials"]) == 6 and result["trials"][:4] == trials
    assert len(runs(work)) == 6, "the interrupted trials went on in their folders"
    after = {run.name: (run / "summary.json").stat().st_mtime for run in runs(work)}
    assert {name: after[name] for name in before} == before, "a finished trial ran again"
    objectives = [trial["objective"] for trial in result["trials"]]
    assert result["best"]["objective"] == min(objectives)
    for run in runs(work):
        best = read_json(run / "summary.json")["best"]
        worst = max(value for name, value in best.items() if name.startswith("valid/loss/"))
        assert best["by"] == "worst" and best["value"] == pytest.approx(worst)
    assert {round(run_best, 6) for run_best in objectives} == {
        round(read_json(run / "summary.json")["best"]["value"], 6) for run in runs(work)
    }
    assert "best of 6 trials" in said and "one seed a trial" in said


@pytest.mark.slow
@pytest.mark.long
def test_failing_trials_are_told_tried_again_and_make_the_exit_code(tmp_path: Path) -> None:
    work = two_tasks(tmp_path)
    given = [
        *SEARCH,
        "hydra.sweeper.n_trials=3",
        "hydra.sweeper.sampler=random",
        "optimizer.lr=choice(1e-3,1e30)",
    ]
    for _ in range(2):
        code, said = mft(work, *given)
        states = [trial["state"] for trial in found(work)["trials"]]
        assert code == 1 and "failed; the same command again" in said, said
        assert len(states) == 3 and {"fail", "complete"} == set(states), "seed 0 draws both choices"
    failed = [run for run in runs(work) if run_folder.state(run) == "failed"]
    assert failed and all("non-finite" in (run / "log" / "traceback.txt").read_text() for run in failed)


def test_what_a_search_is_made_of() -> None:
    fixed, space = split(
        ["a=1", "b=range(8,33,8)", "c.d=tag(log,interval(1e-5,1e-3))"], {"c": {"d": "choice(1,2)"}}
    )
    assert fixed == ["a=1"] and list(space) == ["b", "c.d"]
    assert (space["b"].low, space["b"].high, space["b"].step) == (8, 32, 8)
    assert (space["c.d"].low, space["c.d"].high, space["c.d"].log) == (1e-5, 1e-3, True)
    assert boundary_trials(space) == [["b=8", "c.d=1e-05"], ["b=32", "c.d=0.001"]]
    assert distribution("x=int(interval(1,9))").high == 9 and distribution("x=a,b").choices == ("a", "b")
    for wrong in ("x=3", "x=interval(5,1)", "x=interval("):
        with pytest.raises(UserError, match="x="):
            distribution(wrong)


@pytest.mark.parametrize(
    ("given", "parts"),
    [
        (["hydra.sweeper.sampler=tpo"], ["hydra.sweeper.sampler=tpo", "did you mean tpe?"]),
        (["hydra.sweeper.n_trials=0"], ["hydra.sweeper.n_trials=0", "at least 1"]),
        (["peft.rank=choice(4,-1)"], ["peft.rank=-1"]),
        (["loss=token_mean"], ["loss.tau"]),
        (["optimizer.lr=1e-3", "peft.rank=4"], ["nothing to search"]),
        (["optimizer.lrr=interval(1,2)"], ["optimizer.lrr", "did you mean lr?"]),
    ],
)
def test_a_mistake_is_told_before_anything_starts(
    given: list[str], parts: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys
) -> None:
    monkeypatch.chdir(two_tasks(tmp_path))
    monkeypatch.setenv("MFT_CACHE", str(tmp_path / "cache"))
    kept = [o for o in SEARCH if o.split("=")[0] not in {word.split("=")[0] for word in given}]
    with pytest.raises(SystemExit) as caught:
        cli.main([*kept, *given, "--dry-run"])
    said = capsys.readouterr().err
    assert caught.value.code == 2 and all(part in said for part in parts), said
    assert not list(tmp_path.glob("multirun/*/*"))
