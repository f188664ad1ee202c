"""The command line of every verb: flags, help and defaults by argparse, errors in our own grammar.

argparse reads the flags. What is left are the verb's words, in order: folders, prompts, overrides of the
config. A word after `--` is taken as it is, so that `mft generate RUN -- --help` asks the model about --help.
"""

from __future__ import annotations

import argparse
import shutil
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mft.console.screen import say
from mft.errors import UserError, nearest, shortened

HELP_FLAGS = ("-h", "--help")

WIDEST = 110
"""Columns of a help text at most."""


class HelpPrinted(Exception):
    """Raised once a verb's help is on the screen: there is nothing left to do."""


@dataclass(frozen=True)
class Value:
    """What a flag takes."""

    expects: str
    """In words, after "needs": "a number such as 0.95"."""

    metavar: str
    """Its place in the help: N, DIR, …"""

    read: Callable[[str], Any] = str
    """Turns the text into the value; ValueError where it cannot."""

    allowed: tuple[str, ...] = ()
    """All values, where they are few; () for any."""

    def __call__(self, text: str) -> Any:
        try:
            if self.allowed and text not in self.allowed:
                raise ValueError
            return self.read(text)
        except ValueError:
            hint = nearest(text, self.allowed) or "."
            raise argparse.ArgumentTypeError(f"needs {self.expects}, got {shortened(text)}{hint}") from None


def one_of(metavar: str, *allowed: str) -> Value:
    """Returns the value that is one of a few words."""
    return Value(f"one of {', '.join(allowed)}", metavar, allowed=allowed)


def _boolean(text: str) -> bool:
    if text.lower() not in ("true", "false"):
        raise ValueError
    return text.lower() == "true"


def _count(text: str) -> int:
    if (number := int(text)) < 1:
        raise ValueError
    return number


TEXT = Value("a text", "TEXT")
FOLDER = Value("a folder", "DIR", Path)
FILE = Value("a file", "FILE", Path)
INTEGER = Value("a whole number such as 4", "N", int)
COUNT = Value("a whole number from 1", "N", _count)
NUMBER = Value("a number such as 0.5", "X", float)
BOOLEAN = Value("true or false", "true|false", _boolean)


def _formatter(prog: str) -> argparse.HelpFormatter:
    columns = min(WIDEST, shutil.get_terminal_size((WIDEST, 24)).columns)
    return argparse.RawDescriptionHelpFormatter(prog, max_help_position=30, width=columns)


class Parser(argparse.ArgumentParser):
    """The command line of one verb.

    words: what stands beside the flags, for the usage line; examples: commands with what they do; overrides:
    whether words are overrides of the config, so that a mistaken flag may have been meant as one; actions:
    the verb's own subcommands, of which the first word is one.
    """

    def __init__(
        self,
        verb: str,
        words: str,
        story: str,
        examples: str = "",
        overrides: bool = False,
        actions: Sequence[str] = (),
    ):
        super().__init__(
            prog=f"mft {verb}",
            usage=f"mft {verb} {words}".rstrip(),
            description=story,
            epilog=f"examples:\n{examples}" if examples else None,
            formatter_class=_formatter,
            add_help=False,
            allow_abbrev=False,  # a flag that is added later must not change what a script's abbreviation means
            exit_on_error=False,
        )
        self.overrides = overrides
        self.actions = tuple(actions)
        self.flags: dict[str, argparse.Action] = {}
        self._formerly: set[str] = set()
        self.switch(*HELP_FLAGS, help="print this text")

    def switch(self, *names: str, help: str) -> None:
        """Adds a flag without a value, False unless it is given."""
        self._keep(self.add_argument(*names, action="store_true", help=help))

    def option(
        self, *names: str, takes: Value, help: str, default: Any = None, formerly: bool = False, **more: Any
    ) -> None:
        """Adds a flag with a value. formerly: whether it was written key=value, which is still understood."""
        if takes.allowed:
            help += f": {takes.expects}"
        if default not in (None, ""):
            help += f" (default: {str(default).lower() if isinstance(default, bool) else default})"
        action = self.add_argument(
            *names, type=takes, default=default, metavar=takes.metavar, help=help.replace("%", "%%"), **more
        )
        self._keep(action)
        if formerly:
            self._formerly.add(action.dest)

    def _keep(self, action: argparse.Action) -> None:
        self.flags |= dict.fromkeys(action.option_strings, action)

    def composing(self) -> None:
        """Adds the flags of verbs that compose a config, or load what plug-ins bring."""
        self.option(
            "--config-dir",
            "-cd",
            takes=FOLDER,
            action="append",
            help="a folder of your own yaml files beside conf/ (task/mine.yaml, experiment/mine.yaml, …); repeatable",
        )
        self.plugins()

    def plugins(self) -> None:
        """Adds --plugin."""
        self.option(
            "--plugin",
            takes=Value("the name of a Python package, for example --plugin mypkg", "PACKAGE"),
            action="append",
            help="a Python package of your own components, which yaml files may then name; repeatable",
        )

    def parse(self, arguments: Sequence[str]) -> argparse.Namespace:
        """Returns the values of the flags, with what else was given as `words`.

        Starts the plug-ins of --plugin. Raises HelpPrinted after --help, UserError for a mistake.
        """
        at = arguments.index("--") if "--" in arguments else len(arguments)
        before, after = list(arguments[:at]), list(arguments[at + 1 :])
        if set(HELP_FLAGS) & set(before):
            print(self.format_help(), end="")
            raise HelpPrinted
        parsed, rest = self._read([self._dashed(word) for word in before])
        words: list[str] = []
        former: list[str] = []
        for word in rest:
            if (
                word.startswith("-")
                and " " not in word
                and not word.lstrip("-")[:1].isdigit()
                and word != "-"
            ):
                raise UserError(self._unknown(word))
            (former if self._is_former(word) else words).append(word)
        if former:
            flags = [
                f"--{key.replace('_', '-')}={value}"
                for key, _, value in (word.partition("=") for word in former)
            ]
            note = f"{' '.join(former)}: the options of {self.prog} are flags now; write {' '.join(flags)}."
            say(f"mft: {note} The old spelling will be refused in a later release.", sys.stderr)
            parsed, _ = self._read(flags, parsed)
        parsed.words = [*words, *after]
        if "--plugin" in self.flags:
            from mft.config import plugins

            plugins.start(parsed.plugin or ())
        return parsed

    def _read(
        self, words: list[str], values: argparse.Namespace | None = None
    ) -> tuple[argparse.Namespace, list[str]]:
        try:
            return self.parse_known_args(words, values)
        except argparse.ArgumentError as error:
            flag = next(
                (name for name in (error.argument_name or "").split("/") if name.startswith("--")), ""
            )
            takes = self.flags[flag].type if flag in self.flags else None
            message = error.message
            if message.startswith("expected") and isinstance(
                takes, Value
            ):  # argparse's own words: no value was given
                message = f"needs {takes.expects}."
            elif message.startswith("ignored explicit argument"):  # argparse's own words: --dry-run=yes
                message = f"takes no value, got{message.removeprefix('ignored explicit argument')}."
            raise UserError(f"{flag} {message}") from None

    def _dashed(self, word: str) -> str:
        """Returns --max_new_tokens as --max-new-tokens, where that is a flag."""
        name, equals, value = word.partition("=")
        dashed = name.replace("_", "-")
        return f"{dashed}{equals}{value}" if dashed in self.flags else word

    def _is_former(self, word: str) -> bool:
        """Whether a word is an option in the former spelling; UserError for one that is nearly that."""
        key, equals, _ = word.partition("=")
        if not equals or not key.isidentifier() or not self._formerly:
            return False
        if key not in self._formerly and not self.overrides and (hint := nearest(key, self._flag_names())):
            raise UserError(
                f"{shortened(word)}: unknown option{hint} A word that is meant as it stands follows --."
            )
        return key in self._formerly

    def _flag_names(self) -> list[str]:
        return [f"--{dest.replace('_', '-')}" for dest in sorted(self._formerly)]

    def _unknown(self, flag: str) -> str:
        names = [name for name in self.flags if name.startswith("--") or name == "-m"]
        if self.overrides:
            from mft.config.overrides import unknown_flag

            return unknown_flag(flag, names, self.prog)
        hint = nearest(flag, names) or "."
        return f"{self.prog} has no flag {shortened(flag)[1:-1]}{hint} Flags: {', '.join(names)}."

    def error(self, message: str) -> Any:
        """Raises what argparse would print."""
        raise UserError(f"{self.prog}: {message}")


def action_of(parser: Parser, words: Sequence[str]) -> tuple[str, list[str]]:
    """Returns the subcommand that was typed and the words behind it; UserError for an unknown one."""
    actions = ", ".join(parser.actions)
    if not words:
        raise UserError(f"{parser.prog} needs a subcommand. Subcommands: {actions}.")
    if words[0] not in parser.actions:
        hint = nearest(words[0], parser.actions)
        if not hint and len(parser.actions) == 1:
            hint = f"; did you mean {parser.prog} {actions} …?"
        raise UserError(
            f"{parser.prog}: unknown subcommand {shortened(words[0])}{hint or '.'} Subcommands: {actions}."
        )
    return words[0], list(words[1:])


def existing_folder(text: str) -> Path:
    """Returns a folder that was named; UserError with the nearest one beside it where there is none."""
    folder = Path(text)
    if not folder.is_dir():
        siblings = [path.name for path in folder.parent.glob("*")]
        raise UserError(f"{text} is not a folder{nearest(folder.name, siblings) or '.'}")
    return folder


def overrides_in(words: Sequence[str]) -> list[str]:
    """Returns words that are overrides; UserError for one that is not, with what was probably meant."""
    from mft.config.overrides import not_an_override

    for word in words:
        if "=" not in word and not word.startswith("~"):
            raise UserError(not_an_override(word))
    return list(words)
