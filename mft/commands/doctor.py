"""Look at this machine: versions, GPUs, disks, network, and what of it all a config needs and can run.

Libraries are really tried, each in a process of its own with a time limit; nothing is changed or started.
Each line is ok, a note, or a problem with its cure. Overrides choose the config that is judged, by default
the one without any. The exit code is 1 where something that the config needs is missing.

examples:
  mft doctor
  mft doctor dist=zero2 peft=qlora                          can exactly this run here?
  mft doctor --json                                         for a bug report; holds no password and no host
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence

from mft.commands.arguments import POSITIVE, Parser, overrides_in
from mft.console.screen import say


def parser() -> Parser:
    """Returns the command line of `mft doctor`."""
    line = Parser("doctor", "[KEY=VALUE …] [--json]", __doc__, overrides=True)
    line.switch("--json", help="print everything as JSON, for a bug report")
    line.option("--patience", POSITIVE, "seconds that each attempt may take", 60)
    line.composing()
    return line


def command(arguments: Sequence[str]) -> None:
    """Prints the findings; exits with 1 where there is a problem."""
    parsed = parser().parse(arguments)
    variables = dict(os.environ)  # before imports add their own
    from mft.doctor.examine import examine, shown
    from mft.doctor.finding import State
    from mft.doctor.report import as_json, show

    overrides = overrides_in(parsed.words)
    found = map(shown, examine(overrides, variables, parsed.config_dir or [], parsed.patience))
    if parsed.json:
        findings = list(found)
        say(as_json(findings))
    else:
        findings = show(found)
    if any(finding.state is State.problem for finding in findings):
        sys.exit(1)
