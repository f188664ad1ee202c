"""The commands that repeat and that plan a run, from what was recorded when it was started."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from pathlib import Path

from mft.config.inputs import under
from mft.config.overrides import key_of
from mft.files.json_file import read_json

NOT_REPEATED = ("output_dir", "train.resume", "sweep", "hydra")
"""Keys of where a run went and how its sweep was started: its repetition has a folder of its own."""


def command(
    overrides: Sequence[str], folder: str = "", search: Sequence[str] = (), plugins: Sequence[str] = ()
) -> str:
    """Returns a line for a shell that trains the same run again, from its start, in a new folder.

    The new folder is `outputs/<name>/<date>`, unless a yaml file names another. overrides: of its command
    line; folder: where that was typed, which relative paths start from, "" where it was not recorded;
    search: folders of yaml files, and packages as pkg://…; plugins: packages.
    """
    # never: an unfinished run of the same identity would be resumed instead
    return _line("train", overrides, folder, search, plugins, "train.resume=never")


def plan_of(run_dir: Path) -> str:
    """Returns a line for a shell that plans the run of a folder, by what is recorded there."""
    record = read_json(run_dir / "overrides.json")
    search, plugins = record.texts("search"), record.texts("plugins")
    return _line("plan", record.texts("overrides"), record.text("folder"), search, plugins)


def _line(
    verb: str,
    overrides: Sequence[str],
    folder: str,
    search: Sequence[str],
    plugins: Sequence[str],
    *more: str,
) -> str:
    keys = {override: key_of(override).replace("/", ".") for override in overrides}
    kept = [o for o in overrides if keys[o] == "hydra.searchpath" or not under(keys[o], NOT_REPEATED)]
    if packages := [place for place in search if place.startswith("pkg://")]:
        kept.append(f"hydra.searchpath=[{','.join(packages)}]")
    words = ["mft", verb]
    for place in search:
        words += [] if place in packages else ["--config-dir", place]
    for package in plugins:
        words += ["--plugin", package]
    line = shlex.join([*words, *kept, *more])
    return f"cd {shlex.quote(folder)} && {line}" if folder else line
