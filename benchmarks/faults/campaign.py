"""Deals the kinds of faults, plays them, records each result, and counts them in a table."""

from __future__ import annotations

import json
import random
import shutil
import time
import traceback
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from benchmarks.faults.case import GOOD, Failure
from benchmarks.faults.kinds import Kind
from benchmarks.faults.places import unmount
from benchmarks.faults.processes import end_all
from benchmarks.faults.setups import Bench, Setup, dealt
from benchmarks.faults.sweeps import SweepCase

TYPED = 0.1
"""The part of the faults whose commands go through `python -m mft.cli`."""


@dataclass(frozen=True)
class Result:
    """What became of one fault."""

    number: int
    kind: str
    outcome: str
    """One of `case.GOOD`, a failure (see `case.Failure`), or DEFECT: the campaign itself broke."""
    struck: str
    detail: str
    setup: str
    typed: bool
    codes: list[int]
    """Exit codes of its commands."""
    took: list[float]
    """Their seconds."""
    seconds: float
    repeat: str
    """The command that plays exactly this fault again."""

    @property
    def good(self) -> bool:
        """Whether the outcome is one that is promised."""
        return self.outcome in GOOD


def kind_of(seed: int, number: int, kinds: Sequence[Kind]) -> Kind:
    """Returns the kind of fault `number`, from 1: all kinds are dealt from a shuffled deck, round by
    round."""
    deck = [kind for kind in kinds for _ in range(kind.share)]
    round_, place = divmod(number - 1, len(deck))
    random.Random(f"deck {seed} {round_}").shuffle(deck)
    return deck[place]


def play(
    bench: Bench, seed: int, number: int, kind: Kind, keep: bool = False, setup: Setup | None = None
) -> Result:
    """Plays one fault, a function of seed, number and kind; the folder stays with `keep`, or where it failed.

    setup: instead of a random one; its commands are then forked.
    """
    draw = random.Random(f"{seed} {number} {kind.name}")
    work = bench.root / "cases" / str(number)
    shutil.rmtree(work, ignore_errors=True)
    work.mkdir(parents=True)
    typed = kind.case is SweepCase or (draw.random() < TYPED and setup is None)
    case = kind.case(bench, setup or draw.choice(dealt(seed)), draw, work, typed)
    detail, began = "", time.monotonic()
    try:
        kind.strike(case)
        case.finish()
        outcome = case.judged()
    except Failure as failure:
        outcome, detail = failure.outcome, failure.detail
    except Exception:  # a bug of the campaign itself: recorded, and the next fault is played
        outcome, detail = "DEFECT", traceback.format_exc()
    finally:
        end_all(work)
        for place in case.mounts:
            unmount(place)
    repeat = f"python -m benchmarks.faults 1 --seed {seed} --first {number} --only '{kind.name}' --keep"
    seconds = round(time.monotonic() - began, 1)
    result = Result(
        number,
        kind.name,
        outcome,
        case.struck,
        detail,
        case.setup.name,
        case.typed,
        case.codes,
        case.took,
        seconds,
        repeat,
    )
    if result.good and not keep:
        shutil.rmtree(work, ignore_errors=True)
    return result


def record(result: Result, path: Path) -> None:
    """Appends a result to a file of JSON lines."""
    with path.open("a", encoding="utf-8") as file:
        file.write(json.dumps(asdict(result)) + "\n")


def table(results: Sequence[Result]) -> str:
    """Returns the table kind x outcome with counts, and how to repeat each failure."""
    outcomes = sorted({result.outcome for result in results}, key=lambda name: (name not in GOOD, name))
    counts = Counter((result.kind, result.outcome) for result in results)
    lines = [f"{'':<26}{'count':>7}" + "".join(f"{name:>16}" for name in outcomes)]
    names = sorted({result.kind for result in results})
    for name in names:
        numbers = [counts[name, outcome] for outcome in outcomes]
        lines.append(f"{name:<26}{sum(numbers):>7}" + "".join(f"{number or '':>16}" for number in numbers))
    totals = [sum(counts[name, outcome] for name in names) for outcome in outcomes]
    lines.append(f"{'all':<26}{sum(totals):>7}" + "".join(f"{number:>16}" for number in totals))
    for result in results:
        if not result.good:
            lines += ["", f"{result.outcome}: {result.kind} ({result.setup}): {result.struck}"]
            lines += [f"  {result.detail}", f"  {result.repeat}"]
    return "\n".join(lines)
