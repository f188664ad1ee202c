"""Which folder a command line starts or resumes in."""

from __future__ import annotations

from pathlib import Path

import pytest

from mft import run_folder
from mft.config.identity import Identity
from mft.errors import UserError
from mft.files.json_file import write_json
from mft.launch.resume_choice import choose, is_finished, step_of

SAME, LONGER, OTHER = (
    Identity.of(["a"], {}, {"train.seed": seed, "train.max_steps": n}, {})
    for seed, n in ((1, 5), (1, 9), (2, 5))
)


def made(folder: Path, identity: Identity = SAME, status: str = "") -> Path:
    write_json(folder / "identity.json", identity.as_json())
    if status:
        write_json(folder / "summary.json", {"status": status})
    return folder


def test_a_dated_folder_resumes_the_newest_unfinished_run_of_its_identity(tmp_path: Path) -> None:
    made(tmp_path / "1", status="stopped")
    newest = made(tmp_path / "2", status="failed")
    made(tmp_path / "3", status="finished")
    made(tmp_path / "4", OTHER)
    fresh = tmp_path / "5"
    assert choose(fresh, True, "auto", SAME) == (newest, True)
    assert choose(fresh, True, "auto", LONGER) == (newest, True), "a longer run is the same run"
    assert choose(fresh, True, "never", SAME) == (fresh, False)
    held = run_folder.lock(newest)
    assert choose(fresh, True, "auto", SAME) == (tmp_path / "1", True), "one that runs now is left alone"
    held.release()


def test_two_runs_started_within_one_second_have_folders_of_their_own(tmp_path: Path) -> None:
    made(tmp_path / "now", status="finished")
    assert choose(tmp_path / "now", True, "auto", SAME) == (tmp_path / "now-2", False)


def test_a_named_folder_resumes_its_run_and_no_other(tmp_path: Path) -> None:
    folder = made(tmp_path / "run", status="stopped")
    assert choose(folder, False, "auto", SAME) == (folder, True)
    assert choose(tmp_path / "new", False, "auto", SAME) == (tmp_path / "new", False)
    with pytest.raises(UserError, match="choose another folder"):
        choose(folder, False, "auto", OTHER)
    with pytest.raises(UserError, match=r"train\.resume=never"):
        choose(folder, False, "never", SAME)


def test_train_resume_names_a_run_or_a_step_of_it(tmp_path: Path) -> None:
    folder = made(tmp_path / "run", status="stopped")
    step = folder / "checkpoints" / "step-4"
    assert step_of(str(step)) == (folder, 4) and step_of(str(folder)) == (folder, None)
    assert choose(tmp_path / "x", True, str(step), SAME) == (folder, True)
    with pytest.raises(UserError, match=r"peft\.path=.*step-4"):
        choose(tmp_path / "x", True, str(step), OTHER)
    with pytest.raises(UserError, match=rf"is not a run folder.*did you mean {folder}\?"):
        choose(tmp_path / "x", True, str(folder / "checkpoints" / "step-x" / "y"), SAME)


def test_a_run_is_finished_at_its_own_length_only(tmp_path: Path) -> None:
    folder = made(tmp_path / "run", status="finished")
    assert is_finished(folder, SAME) and not is_finished(folder, LONGER) and not is_finished(folder, OTHER)
    assert not is_finished(folder, SAME, f"{folder}/checkpoints/step-2"), "an earlier step is asked for"
    assert not is_finished(made(tmp_path / "other", status="stopped"), SAME)
