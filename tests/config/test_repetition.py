"""The command that repeats a run, as a shell reads it."""

from __future__ import annotations

import shlex

from mft.config.repetition import command


def test_it_starts_where_the_run_was_started_and_goes_into_a_new_folder() -> None:
    given = ["loss=coba", "output_dir=runs/a", "train.resume=runs/a", "sweep=x", "hydra.run.dir=b", "+x.y=1"]
    line = command(given, "/home/me/my project")
    assert line == "cd '/home/me/my project' && mft train loss=coba +x.y=1 train.resume=never"
    assert command(["loss=coba"]) == "mft train loss=coba train.resume=never"


def test_folders_of_yaml_files_and_plugins_come_with_it() -> None:
    search = ["/home/me/conf dir", "pkg://mypkg.conf"]
    words = shlex.split(command(["experiment=mine"], search=search, plugins=["mypkg"]))
    assert words == [
        *("mft", "train", "--config-dir", "/home/me/conf dir", "--plugin", "mypkg"),
        *("experiment=mine", "hydra.searchpath=[pkg://mypkg.conf]", "train.resume=never"),
    ]
    kept = command(["hydra.searchpath=[file:///x]", "hydra/launcher=mft", "hydra.sweep.dir=y"])
    assert shlex.split(kept)[2:] == ["hydra.searchpath=[file:///x]", "train.resume=never"]


def test_a_shell_reads_every_override_as_it_was() -> None:
    overrides = [
        "data.paths=[\"a, b\",'c=d']",
        "name=it's",
        "tracking.mlflow.uri=${oc.env:HOME}/x.db",
        "task.x.paths=[$HOME,`ls`,*]",
        "~peft.dropout",
    ]
    assert shlex.split(command(overrides))[2:-1] == overrides
