"""Send what runs (in outputs/ and multirun/, or in DIR) recorded and their MLflow store has not received.

A run that was killed is marked as failed; once resumed it continues as the same run of the store.

examples:
  mft tracking sync
  mft tracking sync multirun/demo --uri http://127.0.0.1:5000
"""

from __future__ import annotations

from collections.abc import Sequence

from mft import run_folder
from mft.commands.arguments import TEXT, Parser, action_of
from mft.commands.runs import run_folders
from mft.console.screen import say
from mft.errors import UserError
from mft.sweep.folder import RECORD


def parser() -> Parser:
    """Returns the command line of `mft tracking`."""
    line = Parser("tracking", "sync [DIR …] [--uri ADDRESS]", __doc__, actions=("sync",))
    line.option("--uri", TEXT, "address of the MLflow store; else the one of each run's config", "")
    return line


def command(arguments: Sequence[str]) -> None:
    """Sends what the stores of runs have missed; UserError with all failures, and where no run is tracked."""
    line = parser()
    parsed = line.parse(arguments or ["--help"])
    _, places = action_of(line, parsed.words)
    from mft.tracking.record import NAME
    from mft.tracking.sender import sync
    from mft.tracking.store import check_address

    if parsed.uri:
        check_address(parsed.uri, "--uri")
    folders = run_folders(places)
    sweeps = dict.fromkeys(folder.parent for folder in folders if (folder.parent / RECORD).exists())
    tracked = [folder for folder in (*folders, *sweeps) if (folder / NAME).exists()]  # a sweep's: its report
    if not tracked:
        raise UserError(
            f"There is no run tracked by MLflow in {', '.join(places) or 'outputs/ and multirun/'}."
        )
    failures = []
    for folder in tracked:
        if run_folder.state(folder) == "running":
            say(f"{folder}: still running, it sends its metrics itself")
            continue
        try:
            count, killed = sync(folder, parsed.uri)
            say(f"{folder}: {count} points and files sent{', marked as failed' if killed else ''}")
        except UserError as error:
            failures.append(str(error))
    if failures:
        raise UserError("\n".join(failures))
