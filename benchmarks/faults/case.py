"""One fault: its folder, the commands given in it, and how it ended."""

from __future__ import annotations

import random
import re
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from benchmarks.faults.judge import differences
from benchmarks.faults.processes import Command, end_all, members
from benchmarks.faults.setups import Bench, Setup, data_override
from mft import run_folder

HANG_SECONDS = 120.0
"""A command that takes longer hangs: without a fault it takes 2 to 15 s."""

LEAVE_SECONDS = 20.0
"""How long processes may live after their command: a rank looks for its launching process every 0.5 s."""

CODES = (0, 1, 2, 75, 130, 143)
"""Exit codes that mft documents."""

ATTEMPTS = 6
"""How often the same command is given: one refusal after another may be followed by its advice."""

GOOD = ("resumed", "refused", "ended")
"""Outcomes as they are promised: resumed by the same command; refused with a sentence whose advice led on;
ended by itself."""


class Failure(Exception):
    """A promise that was not kept; outcome: LOST, HUNG, LEFT A PROCESS, TRACEBACK, WRONG CODE or UNTOLD."""

    def __init__(self, outcome: str, detail: str):
        super().__init__(f"{outcome}: {detail}")
        self.outcome, self.detail = outcome, detail


@dataclass(frozen=True)
class Refusal:
    """A sentence that may refuse the same command, and what a person then does as it says."""

    pattern: str
    mend: Callable[[Case], None]


@dataclass
class Case:
    """One fault. A kind fills in what it expects while it strikes."""

    bench: Bench
    setup: Setup
    draw: random.Random
    work: Path
    """Its folder; the commands are given there, the run is in work/run."""
    typed: bool = False
    """Whether its commands are typed (`python -m mft.cli`) rather than forked."""
    more: list[str] = field(default_factory=list)
    """Further overrides."""
    struck: str = ""
    """What was done, in words."""
    expects: list[str] = field(default_factory=list)
    """Patterns that the output of some command must match."""
    refusals: list[Refusal] = field(default_factory=list)
    """What may be refused."""
    must_refuse: bool = False
    """Whether it must be."""
    losable: bool = False
    """Whether rows of metrics.jsonl were destroyed from outside."""
    intact: list[dict[str, Any]] = field(default_factory=list)
    """The rows that were not."""
    cache: Path | None = None
    """A cold cache for this case alone; None: the shared, warm one."""
    tasks: Path | None = None
    """A copy of the tasks for this case alone; None: the shared ones."""
    said: list[str] = field(default_factory=list)
    """The output of each command."""
    codes: list[int] = field(default_factory=list)
    """Their exit codes."""
    took: list[float] = field(default_factory=list)
    """Their seconds."""
    refused: list[str] = field(default_factory=list)
    """The sentences that refused."""
    mounts: list[Path] = field(default_factory=list)
    """File systems that were mounted for it, to be unmounted at its end."""
    interrupted: bool = False
    """Whether it was given a run that another process began."""

    @property
    def run(self) -> Path:
        """The run folder."""
        return self.work / "run"

    @property
    def cache_dir(self) -> Path:
        """The cache folder of its commands."""
        return self.cache or self.bench.cache

    def data(self) -> str:
        """Returns the override that names its tasks."""
        return data_override(self.tasks) if self.tasks else self.bench.data()

    def given(self) -> list[str]:
        """Returns the arguments of its command."""
        tracking = [] if any(word.startswith("tracking") for word in self.more) else ["tracking=none"]
        return ["train", *self.setup.overrides(), self.data(), "output_dir=run", *tracking, *self.more]

    def again(self) -> list[str]:
        """Returns the arguments of the command that resumes it."""
        return self.given()

    def seconds(self) -> float:
        """Returns how long its command takes without a fault."""
        return self.bench.seconds(self.setup)

    def finished(self) -> bool:
        """Whether there is nothing left to resume."""
        return run_folder.status(self.run) == "finished"

    def differences(self) -> list[str]:
        """Returns in what its result differs from that without a fault."""
        return differences(self.bench.reference(self.setup), self.run, self.losable, self.intact)

    def start(
        self, arguments: Sequence[str] = (), prepare: Callable[[], None] | None = None, typed: bool = False
    ) -> Command:
        """Starts its command, or another one. prepare: see `Command`; such a command is forked."""
        output = self.work / f"output-{len(self.said)}-{time.monotonic_ns()}.txt"
        variables = {"MFT_CACHE": str(self.cache_dir)}
        typed = (typed or self.typed) and prepare is None
        return Command(arguments or self.given(), self.work, output, variables, typed, prepare)

    def end(self, command: Command, anything: bool = False) -> int:
        """Waits for a command and returns its exit code; Failure where it hangs, leaves a process or a
        traceback, or exits with a code that is not documented.

        anything: it was killed, or struck before it could answer to a signal, so its code means nothing.
        """
        code = self.end_of_one(command)
        deadline = time.monotonic() + LEAVE_SECONDS
        while left := members(self.work):
            if time.monotonic() > deadline:
                end_all(self.work)
                raise Failure("LEFT A PROCESS", f"{len(left)} lived on for {LEAVE_SECONDS:.0f} s")
            time.sleep(0.02)
        text = self.said[-1]
        # Python's own answer to a Ctrl-C while it imports the program
        python = text.rstrip().endswith("KeyboardInterrupt") and ", in dispatch" not in text
        if "Traceback (most recent call last)" in text and not python:
            raise Failure("TRACEBACK", text[text.index("Traceback (most") :][:1500])
        if code not in CODES and not anything:
            raise Failure("WRONG CODE", f"{code}; said: {text[-300:]}")
        return code

    def end_of_one(self, command: Command) -> int:
        """Waits for a command beside which another one may go on; Failure where it hangs."""
        code = command.wait(HANG_SECONDS)
        if code is None:
            text = command.text()
            end_all(self.work)
            raise Failure("HUNG", f"no end after {HANG_SECONDS:.0f} s; last said: {text[-300:]}")
        self.said.append(command.text())
        self.codes.append(code)
        self.took.append(round(command.seconds(), 1))
        return code

    def strike(self, words: str) -> None:
        """Notes what was done."""
        self.struck += ("; " if self.struck else "") + words

    def finish(self) -> None:
        """Gives the same command until the run has finished, following the advice of what refuses it."""
        for _ in range(ATTEMPTS):
            if self.codes and self.codes[-1] == 0 and self.finished():
                return
            code = self.end(self.start(self.again()))
            if code == 0:
                continue
            sentence = self.sentence()
            fitting = [refusal for refusal in self.refusals if re.search(refusal.pattern, sentence)]
            if not fitting:
                raise Failure("LOST", f"the same command ended with {code}: {sentence}")
            self.refused.append(sentence)
            fitting[0].mend(self)
        raise Failure("LOST", f"not finished after {ATTEMPTS} commands: exit codes {self.codes}")

    def sentence(self) -> str:
        """Returns the last sentence that the newest command said as an error, or its last line."""
        lines = [line for line in self.said[-1].splitlines() if line.strip()]
        errors = [line for line in lines if line.startswith("mft: ")]
        return (errors or lines or ["(nothing)"])[-1]

    def judged(self) -> str:
        """Returns the outcome of a run that finished; Failure where it is not the reference's."""
        if found := self.differences():
            raise Failure("LOST", "; ".join(found[:4]))
        everything = "\n".join(self.said)
        for pattern in self.expects:
            if not re.search(pattern, everything):
                raise Failure("UNTOLD", f"nobody said {pattern!r}")
        if self.must_refuse and not self.refused:
            raise Failure("UNTOLD", "it was not refused")
        ended = len(self.codes) == 1 and not self.interrupted
        return "refused" if self.refused else "ended" if ended else "resumed"
