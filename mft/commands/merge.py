"""Write base + adapter as a plain Hugging Face folder, and compare its logits with those of base + adapter.

examples:
  mft merge outputs/demo/…                                  into its merged/
  mft merge --base BASE --adapter FOLDER --out OUT          an adapter without its run folder
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from mft.commands.arguments import BOOLEAN, FOLDER, TEXT, Parser, existing_folder
from mft.commands.trained_model import final_folder, import_family
from mft.console.screen import say
from mft.errors import UserError


def parser() -> Parser:
    """Returns the command line of `mft merge`."""
    line = Parser("merge", "RUN [--out DIR]   or   mft merge --base BASE --adapter DIR --out DIR", __doc__)
    for name, takes, default, meaning in (
        ("--out", FOLDER, None, "where to write the model; of a run: its merged/"),
        ("--adapter", FOLDER, None, "the adapter's folder, where no run is given"),
        ("--base", TEXT, None, "folder or hub name of the base model, if not the adapter's own"),
        ("--trust-remote-code", BOOLEAN, False, "run Python code that comes with the base model"),
    ):
        line.option(name, takes, meaning, default, formerly=True)
    line.plugins()
    return line


def command(arguments: Sequence[str]) -> None:
    """Merges the adapter of a run, or the one that is named."""
    parsed = parser().parse(arguments or ["--help"])
    if len(parsed.words) > 1:
        raise UserError(f"mft merge takes one run folder (and --out DIR), got {' '.join(parsed.words)}.")
    from mft.hardware import quiet_libraries
    from mft.model.merge import merge

    quiet_libraries()
    adapter, out = parsed.adapter, parsed.out
    if parsed.words:
        run = parsed.words[0]
        import_family(run)
        adapter, out = final_folder(run), out or Path(run) / "merged"
    elif not (adapter and out):
        missing = [name for name, value in (("--adapter", adapter), ("--out", out)) if not value]
        raise UserError(f"mft merge needs {' and '.join(missing)}, or a run folder.")
    else:
        existing_folder(str(adapter))
    result = merge(adapter, out, base=parsed.base or None, trust_remote_code=parsed.trust_remote_code)
    say(f"merged into {out}\n{result}")
