"""One rank that was placed from outside, with a stand-in of tests.launch.entries for the run.

torchrun … -m tests.launch.placed RUN_DIR ENTRY
"""

from __future__ import annotations

import sys
from pathlib import Path

from mft import cli
from mft.launch import worker
from mft.launch.placement import detect_rank
from tests.launch import entries


def command(arguments: list[str]) -> None:
    """A command of `mft`, so that errors are rendered the way they are there."""
    run_dir, entry = arguments
    detect_rank()
    worker.run_job = getattr(entries, entry)
    worker.placed_rank_main(Path(run_dir))


if __name__ == "__main__":
    cli.COMMANDS["placed"] = "tests.launch.placed:command"
    cli.main(["placed", *sys.argv[1:]])
