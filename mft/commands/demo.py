"""`mft demo`: the demo's model and its five code tasks, made once in the cache folder."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from mft.commands.arguments import Parser
from mft.errors import UserError


def parser() -> Parser:
    """Returns the command line of `mft demo`."""
    return Parser(
        "demo",
        "",
        "Make the demo's model and its five code tasks in the cache folder ($MFT_CACHE, else\n"
        "~/.cache/mft). The second call returns at once.",
        "  mft demo && mft train experiment=demo",
    )


def command(arguments: Sequence[str]) -> None:
    """Makes what is missing and prints what there is."""
    parsed = parser().parse(arguments)
    if parsed.words:
        raise UserError(
            f"mft demo takes no arguments, got {' '.join(parsed.words)}; the cache folder is set by "
            f"MFT_CACHE."
        )
    from mft.config.schema import default_cache_dir
    from mft.demo import describe, make

    folder = make(Path(default_cache_dir()), print)
    for row in describe(folder):
        print("  ".join(str(cell) for cell in row))
    print(f"the demo's input is in {folder}; train on it with: mft train experiment=demo")
