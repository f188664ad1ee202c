"""`mft merge`: an adapter and its base model become one plain model folder."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from mft.commands.arguments import BOOLEAN, FOLDER, TEXT, Parser
from mft.commands.trained_model import final_folder, import_family
from mft.console.screen import say
from mft.errors import UserError

EXAMPLES = """\
  mft merge outputs/demo/…                                  into its merged/
  mft merge --base BASE --adapter FOLDER --out OUT          an adapter without its run folder"""


def parser() -> Parser:
    """Returns the command line of `mft merge`."""
    made = Parser(
        "merge",
        "RUN [--out DIR]   or   mft merge --base BASE --adapter DIR --out DIR",
        "Write base + adapter as a plain Hugging Face folder, and compare its logits with those of base + "
        "adapter.",
        EXAMPLES,
    )
    made.option("--out", takes=FOLDER, formerly=True, help="where to write the model; of a run: its merged/")
    made.option("--adapter", takes=FOLDER, formerly=True, help="the adapter's folder, where no run is given")
    made.option(
        "--base",
        takes=TEXT,
        formerly=True,
        help="folder or hub name of the base model, if not the adapter's own",
    )
    made.option(
        "--trust-remote-code",
        takes=BOOLEAN,
        default=False,
        formerly=True,
        help="run Python code that comes with the base model",
    )
    made.plugins()
    return made


def command(arguments: Sequence[str]) -> None:
    """Merges the adapter of a run, or the one that is named."""
    parsed = parser().parse(arguments or ["--help"])
    if len(parsed.words) > 1:
        raise UserError(
            f"mft merge takes one run folder, got {' '.join(parsed.words)}; where to write it is --out DIR."
        )
    from mft.hardware import quiet_libraries
    from mft.model.merge import merge

    quiet_libraries()
    if parsed.words:
        run = parsed.words[0]
        import_family(run)
        adapter, out = final_folder(run), parsed.out or Path(run) / "merged"
    else:
        missing = [f"--{name}" for name in ("adapter", "out") if not getattr(parsed, name)]
        if missing:
            raise UserError(f"mft merge needs {' and '.join(missing)}, or a run folder.")
        adapter, out = parsed.adapter, parsed.out
    result = merge(adapter, out, base=parsed.base or None, trust_remote_code=parsed.trust_remote_code)
    say(f"merged into {out}\n{result}")
