"""One thing that was looked at: whether it is in order, what was found, and the cure."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum


class State(StrEnum):
    """How a finding is to be read."""

    ok = "ok"
    """There, and works."""
    note = "note"
    """Worth knowing; the config does not need it."""
    problem = "problem"
    """The config needs it, and it is not there."""


@dataclass(frozen=True)
class Finding:
    """A line of the report."""

    part: str
    """What it belongs to: versions, machine, places, network, environment, abilities or config."""
    name: str
    """What was looked at, e.g. torch."""
    state: State
    found: str
    """What was found, in words; holds no password, no token and no name of a host."""
    cure: str = ""
    """What to do about it, "" where nothing has to be done."""


@dataclass(frozen=True)
class Part:
    """Makes the findings of one part of the report."""

    name: str

    def ok(self, name: str, found: str) -> Finding:
        return Finding(self.name, name, State.ok, found)

    def note(self, name: str, found: str, cure: str = "") -> Finding:
        return Finding(self.name, name, State.note, found, cure)

    def problem(self, name: str, found: str, cure: str) -> Finding:
        return Finding(self.name, name, State.problem, found, cure)
