"""Prove on your own config that a stopped and resumed run is the uninterrupted one, to the bit.

The config is trained twice: straight through --steps steps, and with a stop after step --at (as by SIGTERM:
the step is finished, a checkpoint saved, the ranks end) and a resume in new processes. Then the batches of
every rank, losses, gradient norms, task weights, learning rates, validations and final parameters are
compared, and the first difference is printed.

Of comma-separated values every combination is a cell, which passed, failed or was refused. All of them are
checked before the first is trained. Exit code: 0; 1 if one failed; 2 if none could be trained.

Trackers and output_dir are left alone. Backends for several ranks get two on a CPU, all GPUs where there are
any, unless launch.nproc is given.

examples:
  mft verify-resume data.paths=[dir1,dir2] model.path=… peft=lora dist=zero2
  mft verify-resume debug=fast data.paths=[dir1,dir2] dist=single,ddp,fsdp loss=famo,dwa --at 3 --steps 8
"""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING

from mft.commands.arguments import COUNT, FOLDER, Parser, overrides_in
from mft.console.screen import console, say
from mft.errors import UserError, writable

if TYPE_CHECKING:
    from mft.verify.attempts import Outcome

AT, STEPS = 5, 10


def parser() -> Parser:
    """Returns the command line of `mft verify-resume`."""
    words = "[KEY=VALUE …] [--at N] [--steps N] [--keep DIR] [--config-dir DIR]"
    line = Parser("verify-resume", words, __doc__, overrides=True)
    line.option("--at", COUNT, "the step after which the run is stopped", AT)
    line.option("--steps", COUNT, "length of the runs in optimizer steps, in place of train.max_steps", STEPS)
    line.option("--keep", FOLDER, "keep the run folders there; it must be new or empty")
    line.switch("-m", "--multirun", help="accepted as in mft train; comma-separated values need no flag")
    line.composing()
    return line


def command(arguments: Sequence[str]) -> None:
    """Verifies every cell and prints a line for each."""
    parsed = parser().parse(arguments or ["--help"])
    overrides = overrides_in(parsed.words)
    if parsed.at >= parsed.steps:
        raise UserError(
            f"--at {parsed.at} must be below --steps {parsed.steps}: a stop needs steps after it."
        )
    from mft.config.overrides import of_hydra, replaced
    from mft.launch.placement import detect_rank
    from mft.launch.spawn import PRELOAD, start_fork_server
    from mft.verify.attempts import verify
    from mft.verify.cells import check_all, not_used

    if detect_rank() is not None:
        raise UserError("mft verify-resume starts its ranks itself: run it without torchrun or srun.")
    for note in [*replaced(overrides), *of_hydra(overrides, sweep=False), *not_used(overrides)]:
        say(f"mft: {note}", sys.stderr)
    cells = check_all(overrides, parsed.config_dir or [], parsed.steps)
    if any(cell.job and ".deepspeed." in cell.job.cfg.dist._target_ for cell in cells):
        start_fork_server((*PRELOAD, "deepspeed"))
    outcomes = []
    for number, cell in enumerate(cells, start=1):
        with run_folders(parsed.keep, number) as folder:
            outcome = verify(cell, folder, parsed.at, parsed.steps)
        outcomes.append(outcome)
        say(line_of(outcome, number, len(cells)))
    conclude(outcomes, parsed.at, parsed.steps)


@contextmanager
def run_folders(keep: Path | None, number: int) -> Iterator[Path]:
    """Yields the folder of a cell's runs. keep: where they stay; None: they are removed."""
    if keep is None:
        with TemporaryDirectory(prefix="mft-verify-") as temporary:
            yield Path(temporary)
        return
    folder = writable(keep.expanduser().absolute(), "--keep") / f"cell-{number:03}"
    if folder.exists() or (number == 1 and any(folder.parent.iterdir())):
        raise UserError(f"--keep {keep} is not empty; choose another folder.")
    yield folder


def line_of(outcome: Outcome, number: int, total: int) -> str:
    """Returns the line of a cell."""
    reason = f": {outcome.reason}" if outcome.reason else ""
    counted = f"{number:>{len(str(total))}}/{total}"
    return f"{counted}  {outcome.verdict:<8} {outcome.cell.label}  {outcome.seconds:.0f} s{reason}"


def conclude(outcomes: Sequence[Outcome], at: int, steps: int) -> None:
    """Prints the table of several cells, and how many passed; raises UserError unless that is a proof."""
    from mft.console.tables import table
    from mft.verify.attempts import Verdict

    if len(outcomes) > 1:
        styles = {Verdict.passed: "green", Verdict.failed: "red", Verdict.refused: "yellow"}
        rows = [(outcome.cell.label, outcome.verdict, outcome.reason) for outcome in outcomes]
        title = f"stopped after step {at} of {steps} and resumed"
        columns = ["cell", "verdict", "first difference, or why it was refused"]
        console().print(table(title, columns, rows, styles=[styles[o.verdict] for o in outcomes]))
    counts = Counter(outcome.verdict for outcome in outcomes)
    counted = ", ".join(f"{counts[verdict]} {verdict}" for verdict in Verdict if counts[verdict])
    if counts[Verdict.failed] or not counts[Verdict.passed]:
        error = UserError(f"{counted}.")
        error.exit_code = 1 if counts[Verdict.failed] else 2
        raise error
    say(f"{counted}: what is stopped after step {at} and resumed is the uninterrupted run, to the bit")
