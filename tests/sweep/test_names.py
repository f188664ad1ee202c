"""Names of a sweep's jobs, in their folders and for those that another package starts."""

from __future__ import annotations

from pathlib import Path

import pytest

from mft import run_folder
from mft.config.compose import compose_resolved
from mft.files.json_file import read_json, write_json
from mft.launch import job
from mft.launch.job import Job
from mft.sweep.folder import job_folder
from mft.sweep.names import named, next_named, recorded
from tests.tiny_runs import write_task


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory, cache_dir: Path) -> list[str]:
    task = write_task(tmp_path_factory.mktemp("data") / "x", 6)
    fixed = ["model=tiny", f"cache_dir={cache_dir}", f"data.paths=[{task}]", "tracking=none", "launch=inline"]
    return [*fixed, f"output_dir={task.parent / 'run'}"]


def checked(base: list[str], **swept: str) -> tuple[Job, dict[str, str]]:
    values = {key.replace("__", "."): value for key, value in swept.items()}
    overrides = [*base, *(f"{key}={value}" for key, value in values.items())]
    return job.checked(compose_resolved(overrides), overrides, starts=False), values


def names(sweep: Path, *jobs: tuple[Job, dict[str, str]]) -> list[str]:
    found = named([one for one, _ in jobs], [values for _, values in jobs], sweep)
    write_json(sweep / "sweep.json", {"names": {job_folder(one, sweep).name: one.name for one in found}})
    assert recorded(sweep) == {job_folder(one, sweep).name: one.name for one in found}
    return [one.name for one in found]


def test_a_grid_that_grows_keeps_the_names_it_gave(base: list[str], tmp_path: Path) -> None:
    one, two, three = (checked(base, loss=loss, train__seed="1") for loss in ("coba", "famo", "dwa"))
    assert names(tmp_path, one) == ["coba · s1"]
    assert names(tmp_path, one, two, three) == ["coba · s1", "famo", "dwa"]
    assert names(tmp_path, three, one, one) == ["dwa", "coba · s1", "coba · s1"], "the same job has one name"


def test_a_search_names_a_job_when_it_comes(base: list[str], tmp_path: Path) -> None:
    known: dict[str, str] = {}
    found = []
    for lr in ("0.001", "0.00100001", "0.002", "0.001"):
        one, values = checked(base, optimizer__lr=lr)
        one = next_named(one, values, tmp_path, known)
        found.append(one.name)
        write_json(job_folder(one, tmp_path) / "overrides.json", one.describe())
    assert found == ["1e-3", "1e-3 #2", "2e-3", "1e-3"]
    assert recorded(tmp_path) == known


def test_a_run_outside_of_sweeps_has_a_name_with_the_time_and_keeps_it(base: list[str]) -> None:
    one, _ = checked(base, loss="coba", peft="lora", optimizer__lr="0.002")
    name = one.describe()["name"]
    assert name.startswith("tiny · coba ") and len(name) <= 20 and name[-6:].isdigit()
    assert one.describe("as before")["name"] == "as before"


def test_the_jobs_of_a_real_sweep(swept: Path) -> None:
    jobs = run_folder.runs_under(swept / "multirun")
    written = {read_json(folder / "overrides.json").text("name") for folder in jobs}
    assert written == {f"{loss} · s{seed}" for loss in ("coba", "task_token_mean") for seed in (1, 2)}
    assert set(read_json(jobs[0].parent / "sweep.json").part("names").values()) == written
    for folder in jobs:
        tags = read_json(folder / "provenance.json")
        assert tags.text("name") in written and tags.text("ranks") == "1" and tags.text("device")
        assert tags.text("command").startswith(f"cd {swept} && mft train debug=fast ")
