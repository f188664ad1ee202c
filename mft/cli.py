"""mft: fine-tune large language models on several tasks at once

commands:
  mft train [KEY=VALUE …]         compose a run from conf/, check it, run it   (-m sweeps, --cfg job prints)
  mft plan [KEY=VALUE …]          memory, time, and what to change where it does not fit (--gpu 8xH100)
  mft data report [KEY=VALUE …]   what becomes of every task's rows (also: show, prepare)
  mft sweep resume DIR            resume an interrupted sweep
  mft verify-resume [KEY=VALUE …] prove that a stopped and resumed run is the uninterrupted one, to the bit
  mft runs [DIR …]                runs and sweeps: state, age, best loss, folder
  mft show RUN                    a run's config beside the defaults, its losses, its files
  mft compare DIR                 ranked table and HTML report of a sweep (or of an MLflow experiment)
  mft tracking sync [DIR …]       send what MLflow has missed; mark runs that were killed
  mft merge RUN                   merge a run's adapter into its base model, and check the logits
  mft merge --base … --adapter … --out …
  mft convert FOLDER              write a model's pickled weights as safetensors
  mft convert model=qwen model.path=… --out …  write an original checkpoint as a native folder
  mft generate RUN "a question"   answer a prompt, encoded as in training
  mft doctor [KEY=VALUE …]        what is installed here, what can run, and the cure for what cannot
  mft demo                        make the demo's model and its five code tasks, once, in the cache folder
  mft completion bash|zsh|fish    print a script that completes all of this on the Tab key

mft COMMAND --help explains every flag. Start here: mft demo && mft train experiment=demo
"""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Sequence

from mft import __version__
from mft.commands.arguments import HelpPrinted
from mft.console.screen import guard_logs, say
from mft.console.streams import steady, unread
from mft.errors import UserError, nearest, no_path, refused_by_system, shortened

HELP = __doc__ or ""
"""What `mft --help` prints. The verbs below are imported when they are typed, so that it waits for none."""

COMMANDS = {
    "train": "mft.commands.train:command",
    "plan": "mft.commands.plan:command",
    "data": "mft.commands.data:command",
    "sweep": "mft.commands.sweep:command",
    "verify-resume": "mft.commands.verify_resume:command",
    "runs": "mft.commands.runs:command",
    "show": "mft.commands.show:command",
    "compare": "mft.commands.compare:command",
    "tracking": "mft.commands.tracking:command",
    "merge": "mft.commands.merge:command",
    "convert": "mft.commands.convert:command",
    "generate": "mft.commands.generate:command",
    "doctor": "mft.commands.doctor:command",
    "demo": "mft.commands.demo:command",
    "completion": "mft.commands.completion:command",
}
"""Verb -> module:function(arguments)."""

WRITE = ("train", "sweep", "compare", "tracking", "merge", "convert", "demo")
"""Verbs whose work is not what they print: they finish it when nobody reads their output any more."""


def main(arguments: Sequence[str] | None = None) -> None:
    """Entry point; exits with 0, 1 (an error), 2 (a wrong command line), 75, 130 or 143."""
    args = list(sys.argv[1:] if arguments is None else arguments)
    steady(lasting=bool(args) and args[0] in WRITE)
    try:
        dispatch(args)
        if sys.__stdout__ is not None and sys.stdout is sys.__stdout__:
            sys.__stdout__.flush()  # here, where a pipe that was closed meanwhile does not end in a traceback
    except BrokenPipeError:
        unread()


def dispatch(args: list[str]) -> None:
    """Runs a verb; what goes wrong is printed as one sentence, and the process exits."""
    if not args or args[0] in ("-h", "--help", "help"):
        print(HELP, end="")
        return
    if args[0] in ("-V", "--version", "version"):
        print(f"mft {__version__}")
        return
    guard_logs()
    try:
        os.getcwd()
    except FileNotFoundError:
        fail("The current folder no longer exists; change to another one.", 2)
    if args[0] not in COMMANDS:
        hint = nearest(args[0], COMMANDS) or "."
        fail(f"unknown command {shortened(args[0])}{hint} Commands: {', '.join(COMMANDS)}.", 2)
    module, _, function = COMMANDS[args[0]].partition(":")
    try:
        getattr(importlib.import_module(module), function)(args[1:])
    except HelpPrinted:
        return
    except UserError as error:
        fail(str(error), error.exit_code)
    except Exception as error:
        if refusal := refused_by_system(error) or no_path(error):
            fail(str(refusal), refusal.exit_code)
        # A WorkerError carries the traceback of the rank that failed; that of this process would hide it.
        if type(error).__name__ != "WorkerError":
            raise
        fail(str(error))
    except KeyboardInterrupt as stopped:
        # signals.Stopped knows whether there is a checkpoint to resume from
        sys.exit(getattr(stopped, "code", 130))


def fail(message: str, code: int = 1) -> None:
    """Prints one error for a person and exits."""
    say(f"mft: {message}", sys.stderr)
    sys.exit(code)


if __name__ == "__main__":
    main()
