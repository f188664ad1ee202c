"""Make the demo's model and its five code tasks in the cache folder ($MFT_CACHE, else ~/.cache/mft).

The second call returns at once.

examples:
  mft demo && mft train experiment=demo
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from mft.commands.arguments import Parser
from mft.errors import UserError


def parser() -> Parser:
    """Returns the command line of `mft demo`."""
    return Parser("demo", "", __doc__)


def command(arguments: Sequence[str]) -> None:
    """Makes what is missing and prints what there is."""
    if words := parser().parse(arguments).words:
        raise UserError(f"mft demo takes no arguments, got {' '.join(words)}; MFT_CACHE sets the folder.")
    from mft.config.schema import default_cache_dir
    from mft.demo import make
    from mft.files.json_file import read_json

    folder = make(Path(default_cache_dir()), print)
    for task, count in read_json(folder / "about.json")["tasks"]["counts"].items():
        print(f"  {task:<14} {count['samples']:5,} samples, {count['characters']:,} characters")
    print(f"the demo's input is in {folder}; train on it with: mft train experiment=demo")
