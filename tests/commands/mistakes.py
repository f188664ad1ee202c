"""The tables of mistakes: wrong command lines in two text files, and wrong files here.

A line of the text files is a command line as a shell reads it, then the words that its sentence must hold,
each behind a bar. `$NAME=value` in front sets a variable of the environment. Lines of mistakes_train.txt are
added to `mft train` and BASE, those of mistakes_verbs.txt are whole commands.
"""

from __future__ import annotations

import shlex
from pathlib import Path

FILES: list = []
BASE = (
    *("model=tiny", "data.paths=[alpha,beta]", "data.seq_length=128", "data.split=[80,20,0]"),
    *("train.precision=fp32", "train.max_steps=2", "tracking=none", "launch=inline"),
)
"""A tiny run that works, in a folder with the two tasks."""


def rows(file: str) -> list[tuple[str, list[str]]]:
    """Returns (command line, words of its sentence) of a text file of this folder."""
    lines = Path(__file__).with_name(file).read_text(encoding="utf-8").splitlines()
    split = [line.split(" | ") for line in lines if line.strip() and not line.startswith("#")]
    return [(line.strip(), [part.strip() for part in parts]) for line, *parts in split]


def words(line: str) -> tuple[dict[str, str], list[str]]:
    """Returns the variables of the environment and the arguments of a command line."""
    split = shlex.split(line.replace(r"\u200b", "\u200b"))
    variables = [word for word in split if word.startswith("$")]
    pairs = (word[1:].partition("=") for word in variables)
    return {name: value for name, _, value in pairs}, [word for word in split if word not in variables]
