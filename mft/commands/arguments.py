"""The command line of every verb: flags, help and defaults by argparse, errors in our own grammar.

argparse reads the flags. What is left are the verb's words, in order: folders, prompts, overrides of the
config. A word after `--` is taken as it is, so that `mft generate RUN -- --help` asks the model about --help.
"""

from __future__ import annotations

import argparse
import functools
import math
import re
import shutil
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

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
    """Turns the text into the value; ValueError or KeyError where it cannot."""

    allowed: tuple[str, ...] = ()
    """All values, where they are few; () for any."""

    # argparse calls it as `type`; it keeps the words of an ArgumentTypeError, and of no other error.
    def __call__(self, text: str) -> Any:
        try:
            if self.allowed and text not in self.allowed:
                raise ValueError
            return self.read(text)
        except (ValueError, KeyError):
            hint = nearest(text, self.allowed) or "."
            raise argparse.ArgumentTypeError(f"needs {self.expects}, got {shortened(text)}{hint}") from None


def one_of(metavar: str, *allowed: str) -> Value:
    """Returns the value that is one of a few words."""
    return Value(f"one of {', '.join(allowed)}", metavar, allowed=allowed)


def _positive(text: str) -> float:
    if not 0 < (number := float(text)) < math.inf:
        raise ValueError
    return number


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
POSITIVE = Value("a number greater than 0", "X", _positive)
BOOLEAN = Value("true or false", "true|false", lambda text: {"true": True, "false": False}[text.lower()])
PLUGIN = Value("the name of a Python package, for example --plugin mypkg", "PACKAGE")


class Parser(argparse.ArgumentParser):
    """The command line of one verb.

    words: what stands beside the flags, for the usage line; story: the help text, by custom the docstring of
    the verb's module, whose last paragraph may be "examples:"; overrides: whether words are overrides of the
    config, so that a mistaken flag may have been meant as one; actions: the verb's own subcommands, of which
    the first word is one.
    """

    def __init__(
        self, verb: str, words: str, story: str | None, overrides: bool = False, actions: Sequence[str] = ()
    ):
        description, examples, commands = (story or "").partition("\n\nexamples:\n")
        columns = min(WIDEST, shutil.get_terminal_size((WIDEST, 24)).columns)
        layout = argparse.RawDescriptionHelpFormatter
        super().__init__(
            prog=f"mft {verb}",
            usage=f"mft {verb} {words}".rstrip(),
            description=description,
            epilog=(examples + commands).strip("\n"),
            formatter_class=functools.partial(layout, max_help_position=30, width=columns),
            add_help=False,
            allow_abbrev=False,  # a flag added later must not change what a script's abbreviation means
            exit_on_error=False,  # an error is raised, and gets our words in `_read`
        )
        self.overrides, self.actions = overrides, tuple(actions)
        # argparse's own table of actions by flag; private, but a copy would have to be kept in step with it.
        self.flags: dict[str, argparse.Action] = self._option_string_actions
        self._formerly: set[str] = set()
        self.switch(*HELP_FLAGS, help="print this text")

    def switch(self, *names: str, help: str) -> None:
        """Adds a flag without a value, False unless it is set."""
        self.add_argument(*names, action="store_true", help=help)

    def option(
        self, names: str, takes: Value, help: str, default: Any = None, formerly: bool = False, **more: Any
    ) -> None:
        """Adds a flag with a value.

        names: separated by a space; formerly: whether it was written key=value, which is still understood.
        """
        if takes.allowed:
            help += f": {takes.expects}"
        if default not in (None, ""):
            help += f" (default: {str(default).lower() if isinstance(default, bool) else default})"
        help = help.replace("%", "%%")  # argparse fills in what follows a %, as printf does
        more |= {"type": takes, "metavar": takes.metavar, "default": default}
        self.add_argument(*names.split(), help=help, **more)
        if formerly:
            self._formerly.add(names)

    def composing(self) -> None:
        """Adds the flags of verbs that compose a config."""
        meaning = "a folder of your own yaml files beside conf/ (such as task/mine.yaml); repeatable"
        self.option("--config-dir -cd", FOLDER, meaning, action="append")
        self.plugins()

    def plugins(self) -> None:
        """Adds --plugin."""
        meaning = "a Python package of your own components, which yaml files may then name; repeatable"
        self.option("--plugin", PLUGIN, meaning, action="append")

    def parse(self, arguments: Sequence[str]) -> argparse.Namespace:
        """Returns the values of the flags, and all other arguments as `words`.

        Starts the plug-ins of --plugin. Raises HelpPrinted after --help, UserError for a mistake.
        """
        # argparse returns what follows -- among the words, where a mistaken flag looks the same
        end = arguments.index("--") if "--" in arguments else len(arguments)
        before, after = arguments[:end], arguments[end + 1 :]
        if set(HELP_FLAGS) & set(before):
            print(self.format_help(), end="")
            raise HelpPrinted
        parsed, rest = self._read([self._dashed(word) for word in before])
        former = [(word, flag) for word in rest if (flag := self._former_flag(word))]
        if former:
            old, new = map(list, zip(*former, strict=True))
            note = f"{' '.join(old)}: the options of {self.prog} are flags now; write {' '.join(new)}."
            say(f"mft: {note} The old spelling will be refused in a later release.", sys.stderr)
            parsed, _ = self._read(new, parsed)
        moved = {word for word, _ in former}
        parsed.words = [word for word in rest if word not in moved] + list(after)
        # Before anything is composed or loaded: a yaml file, or a run's record, may name their classes.
        if "--plugin" in self.flags:
            from mft.config import plugins

            plugins.start(parsed.plugin or ())
        return parsed

    def _read(
        self, words: list[str], values: argparse.Namespace | None = None
    ) -> tuple[argparse.Namespace, list[str]]:
        try:
            parsed, rest = self.parse_known_args(words, values)
        except argparse.ArgumentError as error:
            names = (error.argument_name or "").split("/")
            flag = next((name for name in names if name.startswith("--")), "")
            message = error.message
            # argparse's own words for a missing value, and for --dry-run=yes.
            if message.startswith("expected"):
                message = f"needs {getattr(self.flags[flag].type, 'expects', 'a value')}."
            elif message.startswith("ignored explicit argument"):
                message = f"takes no value, got{message.removeprefix('ignored explicit argument')}."
            raise UserError(f"{flag} {message}") from None
        for word in rest:
            # Neither a negative number nor a prompt such as "- a list".
            if re.fullmatch(r"-+[^-\d ][^ ]*|-{3,}", word):
                raise UserError(self._unknown(word))
        return parsed, rest

    def _dashed(self, word: str) -> str:
        """Returns --max_new_tokens as --max-new-tokens, where that is a flag."""
        name, equals, value = word.partition("=")
        dashed = name.replace("_", "-")
        return f"{dashed}{equals}{value}" if dashed in self.flags else word

    def _former_flag(self, word: str) -> str:
        """Returns --top-p=0.5 for top_p=0.5, its former spelling, else ""; UserError for a typo."""
        key, equals, value = word.partition("=")
        if not equals or not key.isidentifier():
            return ""
        flag = f"--{key.replace('_', '-')}"
        if flag in self._formerly:
            return f"{flag}={value}"
        if not self.overrides and (hint := nearest(key, sorted(self._formerly))):
            raise UserError(f"{shortened(word)}: unknown option{hint} Put -- before a word to pass it as is.")
        return ""

    def _unknown(self, flag: str) -> str:
        names = [name for name in self.flags if name.startswith("--") or name == "-m"]
        if self.overrides:
            from mft.config.overrides import unknown_flag

            return unknown_flag(flag, names, self.prog)
        hint = nearest(flag, names) or "."
        return f"{self.prog} has no flag {shortened(flag)[1:-1]}{hint} Flags: {', '.join(names)}."

    def error(self, message: str) -> NoReturn:
        """Raises what argparse would print."""
        raise UserError(f"{self.prog}: {message}")


def action_of(parser: Parser, words: Sequence[str]) -> tuple[str, list[str]]:
    """Returns the subcommand that was typed and the words behind it; UserError for an unknown one."""
    actions = ", ".join(parser.actions)
    if not words:
        raise UserError(f"{parser.prog} needs a subcommand. Subcommands: {actions}.")
    if words[0] not in parser.actions:
        only = f"; did you mean {parser.prog} {actions} …?" if len(parser.actions) == 1 else "."
        hint = nearest(words[0], parser.actions) or only
        unknown = f"{parser.prog}: unknown subcommand {shortened(words[0])}{hint}"
        raise UserError(f"{unknown} Subcommands: {actions}.")
    return words[0], list(words[1:])


def existing_folder(text: str) -> Path:
    """Returns a folder that was named; UserError with the nearest one beside it where there is none."""
    folder = Path(text)
    if not folder.is_dir():
        siblings = [path.name for path in folder.parent.glob("*/")]
        raise UserError(f"{text} is not a folder{nearest(folder.name, siblings) or '.'}")
    return folder


def overrides_in(words: Sequence[str]) -> list[str]:
    """Returns words that are overrides; UserError for one that is not, with what was probably meant."""
    from mft.config.overrides import not_an_override

    for word in words:
        if "=" not in word and not word.startswith("~"):
            raise UserError(not_an_override(word))
    return list(words)
