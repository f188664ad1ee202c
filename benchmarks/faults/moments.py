"""When a fault strikes: at a random time, or aimed at a phase of a run by what it writes just then."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from benchmarks.faults.case import Case
from benchmarks.faults.processes import Command
from benchmarks.faults.setups import EVERY, STEPS


@dataclass(frozen=True)
class Moment:
    """A phase of a run: how its beginning shows, and how long it lasts."""

    begins: Callable[[Case], Callable[[], bool]]
    """Returns what is true once it has begun."""
    seconds: float
    """A random delay of at most so long follows; of one rank: with more of them a step takes longer."""
    cold: bool = False
    """Whether the case needs an empty cache."""


def _saving(case: Case) -> Callable[[], bool]:
    step = case.draw.randrange(EVERY, STEPS + 1, EVERY)
    folder = case.run / "checkpoints" / f".step-{step}.tmp"
    return folder.exists


def _logged(case: Case, step: int) -> Callable[[], bool]:
    return lambda: f'{{"step": {step}, "train/loss"' in read(case.run / "metrics.jsonl")


def _tokenising(case: Case) -> Callable[[], bool]:
    tokens = case.cache_dir / "tokens"
    return lambda: tokens.exists() and any(path.suffix == ".tmp" for path in tokens.iterdir())


MOMENTS = {
    "at any time": Moment(lambda case: lambda: True, 0.0),  # its delay follows from the reference
    "at start-up": Moment(lambda case: lambda: True, 0.4),
    "as the run folder appears": Moment(lambda case: case.run.exists, 0.05),
    "as the ranks start": Moment(lambda case: (case.run / "log" / "rank0.log").exists, 0.3),
    "in a step": Moment(lambda case: _logged(case, case.draw.randint(1, STEPS - 1)), 0.04),
    "in a save": Moment(_saving, 0.04),
    "in a validation": Moment(lambda case: _logged(case, case.draw.randrange(EVERY, STEPS, EVERY)), 0.02),
    "in final/": Moment(lambda case: (case.run / ".final.tmp").exists, 0.03),
    "in the test": Moment(lambda case: (case.run / "final").exists, 0.15),
    "tokenising": Moment(_tokenising, 0.05, cold=True),
}


def draw(case: Case, *names: str) -> str:
    """Returns the name of a random moment, of those named or of all, and gives a cold one its cache."""
    name = case.draw.choice(names or list(MOMENTS))
    if MOMENTS[name].cold:
        case.cache = case.work / "cache"
    return name


def reach(case: Case, command: Command, name: str) -> str:
    """Waits for a moment of a command; returns it in words."""
    moment = MOMENTS[name]
    begun = command.until(moment.begins(case))
    longest = moment.seconds * (1 if case.setup.dist == "single" else 3)
    delay = case.draw.uniform(0, longest or 1.1 * case.seconds())
    command.wait(delay)
    return f"{name} + {1000 * delay:.0f} ms" if begun else f"{name} (ended before)"


def read(path: Path) -> str:
    """Returns the text of a file, "" where there is none."""
    try:
        return path.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""
