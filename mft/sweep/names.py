"""Short names of a sweep's jobs. A job keeps the name it was given first, however the sweep grows."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path

from mft.console.short_names import short_names
from mft.files.json_file import read_json
from mft.launch.job import Job
from mft.sweep.folder import RECORD, job_folder


def recorded(folder: Path) -> dict[str, str]:
    """Returns {name of a job's folder: name of the job} of those that a sweep's folder knows."""
    names = read_json(folder / RECORD).part("names")
    known = {key: names.text(key) for key in names}
    known |= {file.parent.name: read_json(file).text("name") for file in folder.glob("*/overrides.json")}
    return {key: name for key, name in known.items() if name}


def named(jobs: Sequence[Job], swept: Sequence[Mapping[str, str]], folder: Path) -> list[Job]:
    """Returns the jobs of a grid with their names.

    swept: {key: value} of each job's swept overrides; folder: the sweep's.
    """
    known = recorded(folder)
    # A job that is an earlier one again has its name.
    settings = {job_folder(job, folder).name: values for job, values in zip(jobs, swept, strict=True)}
    kept = [known.get(key, "") for key in settings]
    names = dict(zip(settings, short_names(list(settings.values()), kept), strict=True))
    return [dataclasses.replace(job, name=names[job_folder(job, folder).name]) for job in jobs]


def next_named(job: Job, swept: Mapping[str, str], folder: Path, names: dict[str, str]) -> Job:
    """Returns a job of a search, whose jobs are not known in advance, with its name.

    names: as `recorded` returns them; a new one is added.
    """
    key = job_folder(job, folder).name
    if key not in names:
        taken = list(names.values())
        names[key] = short_names([*({} for _ in taken), swept], taken)[-1]
    return dataclasses.replace(job, name=names[key])
