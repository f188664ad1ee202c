"""Resume an interrupted sweep: run the command of its folder again, from the folder it was started in.

Finished jobs are skipped, unfinished ones resume from their checkpoint, failed ones are tried again. Further
overrides are added to the command.

examples:
  mft sweep resume multirun/demo
  mft sweep resume multirun/demo launch.jobs=2
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from mft.commands.arguments import Parser, action_of, overrides_in
from mft.errors import UserError


def parser() -> Parser:
    """Returns the command line of `mft sweep`."""
    words = "resume DIR [KEY=VALUE …] [--dry-run]"
    line = Parser("sweep", words, __doc__, overrides=True, actions=("resume",))
    line.switch("--dry-run", help="print which jobs would run, with all of them checked, and start nothing")
    line.plugins()
    return line


def command(arguments: Sequence[str]) -> None:
    """Resumes the sweep of a folder."""
    line = parser()
    parsed = line.parse(arguments or ["--help"])
    words = parsed.words
    if not words or words[0] in line.actions or not Path(words[0]).is_dir():  # else: mft sweep DIR
        _, words = action_of(line, words)
    if not words:
        raise UserError("mft sweep resume needs the folder of a sweep: mft sweep resume multirun/demo/…")
    # Hydra is imported once the command line is understood.
    from mft.sweep.hydra_app import resume

    resume(Path(words[0]), overrides_in(words[1:]), parsed.dry_run)
