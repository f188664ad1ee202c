"""Where runs are looked for: folders, and MLflow experiments by name. A run that is met twice counts once."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

from mft import run_folder
from mft.console.credentials import hidden, without_credentials
from mft.errors import UserError, nearest, nearest_sibling
from mft.runs.experiments import read_experiment
from mft.runs.folders import read_run
from mft.runs.results import Run
from mft.tracking.store import check_address, client_for, database_file, reason


class Found(NamedTuple):
    """What places hold."""

    runs: list[Run]
    """Each of them once."""

    notes: list[str]
    """Sentences on what was met more than once."""


def at(places: Sequence[str], uris: Sequence[str] = (), metrics: Iterable[str] = ()) -> Found:
    """Returns the runs of places, each of which is a folder or the name of an MLflow experiment.

    uris: of the stores that are searched for experiments, else ./mlflow.db; metrics: names of those that
    will be asked for. Raises UserError for a store that cannot be read, and for a place that is neither.
    """
    metrics = list(metrics)
    runs: list[Run] = []
    for place in places:
        if Path(place).is_dir():
            runs += [read_run(folder, metrics) for folder in run_folder.runs_under(Path(place))]
        else:
            runs += _of_stores(place, uris, metrics)
    found = _once(runs)
    if uris and all(Path(place).is_dir() for place in places):
        found.notes.append("--uri has no effect: the places are folders, and no experiment is looked for.")
    return found


def _of_stores(name: str, uris: Sequence[str], metrics: Sequence[str]) -> list[Run]:
    """Returns the runs of an experiment in all stores that have it."""
    if not uris and not Path("mlflow.db").exists():
        if hint := nearest_sibling(Path(name)):
            raise UserError(f"{name} is not a folder{hint}")
        raise UserError(
            f"{name} is not a folder, and there is no MLflow store here (mlflow.db) that could hold an "
            "experiment; --uri names another."
        )
    runs, names, found = [], [], False
    for uri in uris or [f"sqlite:///{Path('mlflow.db').resolve()}"]:
        if "://" in uri and not uri.startswith("file:"):
            check_address(uri, "--uri")
        if (database := database_file(uri)) is not None and not database.exists():
            raise UserError(f"--uri {uri}: there is no such file.")  # MLflow would create it
        try:
            client = client_for(uri)
            experiment = client.get_experiment_by_name(name)
            if experiment is None:
                names += [e.name for e in client.search_experiments()]
                continue
            found = True
            of_store = read_experiment(client, experiment.experiment_id, name, metrics)
            runs += [replace(run, store=without_credentials(uri)) for run in of_store]
        except UserError:
            raise
        except Exception as error:
            raise UserError(f"--uri {hidden(uri)}: cannot be read: {reason(error, uri)}") from error
    if not found:
        stores = ", ".join(map(hidden, uris)) or "./mlflow.db"
        hint = nearest(name, names) or nearest_sibling(Path(name)) or "."
        raise UserError(f"{name} is neither a folder nor an experiment of {stores}{hint}")
    return runs


def _once(runs: Sequence[Run]) -> Found:
    """Returns the runs without those that are others again.

    Of two readings the one of a folder is kept, with the metrics that only the store has.
    """
    kept: list[Run] = []
    by_key: dict[str, int] = {}
    by_place: dict[str, int] = {}
    again = 0
    for run in runs:
        place = by_place.get(run.place) if run.place else None
        # One that was removed and trained again in the same place is another.
        if place is not None and run.key and kept[place].key not in ("", run.key):
            place = None
        number = by_key.get(run.key, place) if run.key else place
        if number is None:
            number = len(kept)
            kept.append(run)
        else:
            again += 1
            if kept[number].store and not run.store:
                kept[number], run = run, kept[number]
            if run.store and not kept[number].store:
                _add_from_store(kept[number], run)
        if run.key:
            by_key[run.key] = number
        if run.place:
            by_place[run.place] = number
    notes = []
    if again:
        what = "1 run was met twice and counts" if again == 1 else f"{again} runs were met twice and count"
        notes.append(f"{what} once (in a folder and in a store, or in places that overlap).")
    return Found(kept, notes)


def _add_from_store(run: Run, stored: Run) -> None:
    """Adds what was logged to a store alone, by other programs, to the run of a folder."""
    own = {"step", *run.names()}
    rows = [
        {name: value for name, value in row.items() if name not in own} | {"step": row["step"]}
        for row in stored.rows
    ]
    run.rows += [row for row in rows if len(row) > 1]
    run.metrics |= {name: value for name, value in stored.metrics.items() if name not in own}
