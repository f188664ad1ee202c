"""Runs of 8e2545b, whose identity has no version: everything that reads runs reads them, resuming them is
refused."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from mft import cli, run_folder
from mft.errors import UserError
from mft.files.json_file import read_json
from mft.launch.worker import run_job

FIXTURE = Path(__file__).parent / "fixtures" / "runs_8e2545b"
WRITTEN_AS = "/runs_8e2545b"
SWEEP = Path("multirun/half/3f52439f4e")
FINISHED_JOB, STOPPED_JOB = SWEEP / "7540870ada", SWEEP / "00e54889e7"
ADAPTERS = [
    "finished/final",
    "finished/checkpoints/step-9",
    "stopped/checkpoints/step-853",
    f"{FINISHED_JOB}/final",
]


@pytest.fixture
def old(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of the fixture, as if its runs had been made there; the working directory."""
    folder = tmp_path / "old"
    shutil.copytree(FIXTURE, folder)
    for path in folder.rglob("*"):
        if path.suffix in (".yaml", ".json") and path.is_file():
            path.write_text(path.read_text().replace(WRITTEN_AS, str(folder)))
    monkeypatch.chdir(folder)
    monkeypatch.setenv("MFT_CACHE", str(folder / "cache"))
    return folder


def mft(capsys: pytest.CaptureFixture[str], *args: str) -> str:
    cli.main(list(args))
    return capsys.readouterr().out


def refused(capsys: pytest.CaptureFixture[str], *args: str) -> str:
    with pytest.raises(SystemExit) as caught:
        cli.main(list(args))
    assert caught.value.code == 2
    lines = capsys.readouterr().err.splitlines()
    return "\n".join(line for line in lines if " times; " not in line)  # of keys that the command sets twice


def again(run: Path, *more: str) -> list[str]:
    """Returns the command of a run, as its overrides.json has it."""
    return ["train", *read_json(run / "overrides.json")["overrides"], *more]


def test_they_are_listed_shown_and_compared(old: Path, capsys: pytest.CaptureFixture[str]) -> None:
    listed = mft(capsys, "runs", "finished", "stopped", "multirun")
    assert "runs and sweeps: 3" in listed and "sweep of 2 jobs" in listed
    for run, state in (("finished", "finished"), ("stopped", "stopped"), (str(STOPPED_JOB), "stopped")):
        shown = mft(capsys, "show", run)
        assert f"{state}, " in shown and "peft.rank" in shown
    compared = mft(capsys, "compare", str(SWEEP), "--out", "r.html")
    assert "2 runs, 1 setting" in compared and "One setting only" in compared
    assert "2 runs, 2 settings" in mft(capsys, "compare", "finished", "stopped", "--out", "r.html")


@pytest.mark.slow
@pytest.mark.parametrize("adapter", ADAPTERS)
def test_their_adapters_are_merged_and_answer(
    old: Path, adapter: str, capsys: pytest.CaptureFixture[str]
) -> None:
    mft(capsys, "merge", adapter, "--out", "merged")
    assert (old / "merged" / "model.safetensors").is_file()
    answer = mft(capsys, "generate", adapter, "x 1", "max_new_tokens=3")
    assert answer


@pytest.mark.parametrize(
    ("run", "more", "advice"),
    [
        ("finished", [], "peft.path=FOLDER/finished/final"),
        ("stopped", ["output_dir=stopped"], "peft.path=FOLDER/stopped/checkpoints/step-853"),
        (
            "stopped",
            ["output_dir=new", "train.resume=stopped"],
            "peft.path=FOLDER/stopped/checkpoints/step-853",
        ),
    ],
)
def test_resuming_them_is_refused_with_what_still_works(
    old: Path, run: str, more: list[str], advice: str, capsys: pytest.CaptureFixture[str]
) -> None:
    before = {path: path.read_bytes() for path in (old / run).rglob("*") if path.is_file()}
    command = [word for word in again(old / run) if not (more and word.startswith("output_dir"))]
    said = refused(capsys, *command, *more, "launch=inline")
    assert "another version of mft wrote (identity 1; this one writes identity 2)" in said
    assert "mft show, compare, merge and generate still read it" in said
    assert advice.replace("FOLDER", str(old)) in said
    assert "another config" not in said and len(said.splitlines()) == 1
    assert before == {
        path: path.read_bytes()
        for path in (old / run).rglob("*")
        if path.name != run_folder.LOCK and path.is_file()
    }
    assert not (old / "new").exists()


def test_a_rank_started_by_hand_refuses_them(old: Path) -> None:
    with pytest.raises(UserError, match=r"written by another version of mft \(identity 1"):
        run_job(str(old / "stopped"))


def test_their_half_done_sweep_is_refused_before_any_job_starts(
    old: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = sorted(SWEEP.rglob("*"))
    said = refused(capsys, "sweep", "resume", str(SWEEP))
    assert "holds jobs that another version of mft wrote (identity 1" in said and "sweep=NAME" in said
    assert "still read them" in said and len(said.splitlines()) == 1
    command = ["train", "-m", *read_json(SWEEP / "sweep.json")["overrides"]]
    assert "holds jobs that another version of mft wrote" in refused(capsys, *command, "--dry-run")
    assert [path for path in sorted(SWEEP.rglob("*")) if path.name != "multirun.yaml"] == before


def test_their_adapter_is_where_a_new_run_starts(old: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = [word for word in again(old / "finished") if not word.startswith("output_dir")]
    said = mft(capsys, *command, "peft.path=finished/final", "output_dir=further", "--check")
    assert "would run" in said
