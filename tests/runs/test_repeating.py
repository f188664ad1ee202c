"""The command of a run, given to a shell, trains the same run again."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from mft import run_folder
from mft.files.json_file import read_json
from mft.runs.places import at
from mft.runs.results import Run
from tests.sweeping import FAST, mft, two_tasks
from tests.tiny_runs import logged

pytestmark = pytest.mark.slow

EXPERIMENT = """# @package _global_
defaults:
  - override /loss: coba
train: {seed: 7}
"""


def repeat(run: Run, work: Path, elsewhere: Path) -> Path:
    """Gives the command of a run to a shell in another folder; returns the new run's folder."""
    before = set(run_folder.runs_under(work / "outputs"))
    env = os.environ | {"MFT_CACHE": str(work / "cache"), "OMP_NUM_THREADS": "1"}
    line = f'mft() {{ "{sys.executable}" -m mft.cli "$@"; }}; {run.command}'
    env["PYTHONPATH"] = f"{work}{os.pathsep}{os.getcwd()}"
    # other tests count the runs of the sweep's store
    env["MLFLOW_TRACKING_URI"] = f"sqlite:///{elsewhere}/mlflow.db"
    done = subprocess.run(
        line, shell=True, cwd=elsewhere, env=env, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, f"{line}\n{done.stdout}{done.stderr}"
    (new,) = set(run_folder.runs_under(work / "outputs")) - before
    return new


def require_same(run: Run, new: Path) -> None:
    assert run.folder is not None
    assert logged(new) == logged(run.folder), "bit-equal"
    assert read_json(new / "identity.json") == read_json(run.folder / "identity.json")


def test_a_job_of_a_sweep_as_its_folder_and_as_the_store_have_it(swept: Path, tmp_path: Path) -> None:
    uri = f"sqlite:///{swept}/mlflow.db"
    (here,) = [run for run in at([str(swept / "multirun")]).runs if run.name == "coba · s2"]
    (there,) = [run for run in at(["small"], [uri]).runs if run.name == "coba · s2"]
    assert here.command == there.command
    require_same(here, repeat(here, swept, tmp_path))


@pytest.mark.long
def test_a_run_of_ones_own_yaml_with_names_that_a_shell_would_read_otherwise(tmp_path: Path) -> None:
    work = two_tasks(tmp_path / "it's $HOME")
    (work / "my conf" / "experiment").mkdir(parents=True)
    (work / "my conf" / "experiment" / "mine.yaml").write_text(EXPERIMENT)
    (work / "docs").rename(work / "docs, old [1]")
    paths = "data.paths=['docs, old [1]',code]"
    given = [FAST[0], "train.max_steps=2", "experiment=mine", paths, "name='a (b)'", "output_dir=out/first"]
    code, said = mft(work, "train", *given, "--config-dir", "my conf", "tracking=none")
    assert code == 0, said
    (run,) = at([str(work / "out")]).runs
    assert run.values["train.seed"] == "7" and run.values["loss"] == "coba"
    new = repeat(run, work, tmp_path)
    require_same(run, new)
    assert new.parent == work / "outputs" / "a (b)"
    again = repeat(run, work, tmp_path)  # never the finished one, and never resumed
    assert again != new


@pytest.mark.long
def test_a_job_of_a_search(tmp_path: Path) -> None:
    pytest.importorskip("optuna")
    work = two_tasks(tmp_path / "work")
    values = "optimizer.lr=tag(log, interval(1e-4, 1e-3))"
    given = [
        FAST[0],
        "train.max_steps=2",
        FAST[3],
        values,
        "hydra/sweeper=optuna",
        "hydra.sweeper.n_trials=2",
    ]
    code, said = mft(work, "train", "-m", *given, "tracking=none", "name=s", "train.eval_every=1")
    assert code == 0, said
    runs = at([str(work / "multirun")]).runs
    assert len({run.name for run in runs}) == 2 and all("e-4" in run.name for run in runs)
    require_same(runs[1], repeat(runs[1], work, tmp_path))
