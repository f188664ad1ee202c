"""One rank that was placed from outside, with a stand-in of tests.distributed.entries for the run.

torchrun … -m tests.distributed.placed RUN_DIR ENTRY
"""

from __future__ import annotations

import sys

from mft import cli
from mft.launch.launch import launch


def main(run_dir: str, entry: str) -> None:
    launch(run_dir, entry=f"tests.distributed.entries:{entry}")


if __name__ == "__main__":
    cli.COMMANDS["placed"] = "tests.distributed.placed:command"
    cli.main(["placed", *sys.argv[1:]])


def command(arguments: list[str]) -> None:
    """A command of `mft`, so that errors are told the way they are told there."""
    main(*arguments)
