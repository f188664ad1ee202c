"""Print a run's state and losses, what its config changes of the defaults, and where its files are.

examples:
  mft show outputs/demo/…
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

from mft.commands.arguments import Parser
from mft.commands.runs import steps
from mft.console.screen import console
from mft.errors import UserError
from mft.files.json_file import Values, read_json
from mft.objective import VALID_LOSS
from mft.runs.folders import read_run
from mft.runs.results import FINGERPRINT, Run, flat

FILES = {
    "config": "config.yaml",
    "metrics": "metrics.jsonl",
    "model": "final",
    "checkpoints": "checkpoints",
    "pictures": "report",
    "profile": "profile",
    "output": "log/output.txt",
    "traceback": "log/traceback.txt",
}
"""What is shown of a run folder, where it is there."""


def parser() -> Parser:
    """Returns the command line of `mft show`."""
    return Parser("show", "RUN", __doc__)


def command(arguments: Sequence[str]) -> None:
    """Prints what a run folder holds."""
    words = parser().parse(arguments or ["--help"]).words
    if len(words) != 1:
        raise UserError(f"mft show takes one run folder, got {' '.join(words) or 'none'} (see mft runs).")
    folder = Path(words[0])
    if not (folder / "config.yaml").exists():
        raise UserError(f"{folder} is not a run folder: it has no config.yaml (see mft runs).")
    from rich.text import Text

    from mft.console.tables import pasted, settings_table
    from mft.training import costs
    from mft.training.progress import losses_table

    run, summary = read_run(folder), read_json(folder / "summary.json")
    terminal = console()
    seconds, memory = summary.number("seconds"), summary.number("peak_memory_gib")
    took = "" if seconds is None or memory is None else f", took {seconds:.0f} s and {memory:.1f} GiB at most"
    terminal.print(settings_table([("state", f"{run.state}, {steps(run, folder)} steps{took}")], str(folder)))
    changed = [(key, Text.assemble(value, "  ", (default, "dim"))) for key, value, default in changes(run)]
    terminal.print(settings_table(changed, "changed from the defaults (dim: the default)"))
    first, last, best = (losses_in(summary, part) for part in ("first", "last", "best"))
    test = losses_in(summary, "test", "test/loss/")
    if last or test:
        steps_of = [int(summary.part(part).number("step") or 0) for part in ("best", "test")]
        terminal.print(losses_table(first, last, best, steps_of[0], test, steps_of[1]))
    for cost in costs.tables(summary):
        terminal.print(cost)
    files = [(name, folder / file) for name, file in FILES.items()]
    shown = [(name, path) for name, path in files if path.exists()]
    error = [("error", summary.text("error"))] if summary.text("error") else []
    rows = [*shown, *error, ("again", run.command)]
    terminal.print(pasted(rows, "files, and the command"), soft_wrap=True)


def losses_in(summary: Values, part: str, prefix: str = VALID_LOSS) -> dict[str, float]:
    """Returns the losses in a part of summary.json by task; one that was not finite is inf."""
    return {
        key.removeprefix(prefix): math.inf if loss is None else float(loss)
        for key, loss in summary.part(part).items()
        if key.startswith(prefix) and (loss is None or isinstance(loss, int | float))
    }


def changes(run: Run) -> list[tuple[str, str, str]]:
    """Returns (key, value, default): the options chosen, then values that differ from their options'."""
    from mft.config.compose import compose_resolved
    from mft.config.schema import plain

    def composed(overrides: Sequence[str]) -> dict[str, str]:
        return flat(plain(compose_resolved(overrides)))

    defaults = composed([])
    tops = [key for key in run.values if "." not in key and key in defaults]
    groups = [key for key in tops if key not in ("task", "train")]
    options = [(key, run.values[key], defaults[key]) for key in groups if run.values[key] != defaults[key]]
    # A value is a change beside the options that were chosen: peft=lora brings peft.rank=16 with it.
    try:
        base = composed([f"{key}={value}" for key, value, _ in options])
    except UserError:  # an option of the user's own folder, which --config-dir named then
        base = defaults
    others = [key for key in run.values if key not in groups and not key.endswith("cache_dir")]
    # a fingerprint of what the run does not have is no change
    others = [key for key in others if not (key.endswith(FINGERPRINT) and run.values[key] == "none")]
    values = [(key, run.values[key], base.get(key, "-")) for key in others]
    return options + [change for change in values if change[1] != base.get(change[0])]
