"""`mft sweep resume`: the command of a sweep's folder again, so that an interrupted sweep is finished."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from mft.commands.arguments import Parser, action_of, overrides_in
from mft.errors import UserError

STORY = """\
Run the command of a sweep's folder again, from the folder it was started in. Finished jobs are skipped, unfinished
ones resume from their checkpoint, failed ones are tried again. Further overrides are added to the command."""

EXAMPLES = """\
  mft sweep resume multirun/demo
  mft sweep resume multirun/demo launch.jobs=2"""


def parser() -> Parser:
    """Returns the command line of `mft sweep`."""
    made = Parser(
        "sweep", "resume DIR [KEY=VALUE …] [--dry-run]", STORY, EXAMPLES, overrides=True, actions=("resume",)
    )
    made.switch("--dry-run", help="print which jobs would run, with all of them checked, and start nothing")
    made.plugins()
    return made


def command(arguments: Sequence[str]) -> None:
    """Resumes the sweep of a folder."""
    line = parser()
    parsed = line.parse(arguments or ["--help"])
    words = parsed.words
    if not (
        words and words[0] not in line.actions and Path(words[0]).is_dir()
    ):  # mft sweep DIR is understood, too
        _, words = action_of(line, words)
    if not words:
        raise UserError("mft sweep resume needs the folder of a sweep: mft sweep resume multirun/demo/…")
    from mft.sweep.hydra_app import resume

    resume(Path(words[0]), overrides_in(words[1:]), parsed.dry_run)
