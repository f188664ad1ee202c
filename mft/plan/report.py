"""A plan as a person reads it: tables of at most 80 columns, and lines that can be pasted."""

from __future__ import annotations

import shlex
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from mft.config.overrides import key_of
from mft.console.tables import fitted, pasted, settings_table, table
from mft.estimate.memory import USABLE, size_words
from mft.model.checkpointing import described
from mft.plan.answer import Answer, Outcome

if TYPE_CHECKING:
    from rich.console import RenderableType

    from mft.estimate.rank import RankMemory
    from mft.plan.data import DataPlan
    from mft.plan.plan import Plan

ROWS = 12
"""Changes that are shown at most; the JSON has all of them."""


def parts_of(answer: Answer, width: int) -> Iterator[tuple[RenderableType, bool]]:
    """Yields what is printed, and whether its lines are left unfolded, to be pasted.

    width: columns of the terminal.
    """
    shown = answer.shown
    yield _facts(answer, shown), False
    yield memory_table(shown.plan.memory, shown.plan.case.device.name, _host(shown.plan)), False
    yield _devices(answer, width), False
    if answer.data:
        yield _tasks(answer.data), False
    for note in (*shown.plan.memory.notes, *answer.notes):
        yield note, False
    yield "\n".join(time_lines(answer)), False
    for outcome in answer.outcomes:
        if outcome.advice is not None:
            yield from _advice(answer, outcome, width)


def _facts(answer: Answer, of: Outcome) -> RenderableType:
    plan, sizes = of.plan, of.plan.case.sizes
    counted, trained = plan.skeleton.total, plan.skeleton.sizes.trained
    ranks = f"{plan.case.world} rank{'s' * (plan.case.world > 1)}"
    rows = f"{sizes.per_device} x {sizes.accumulation} micro-batches x {ranks}"
    about = "about " * bool(answer.data and answer.data.about)
    facts = {
        "parameters": f"{counted:,}, of which {trained:,} are trained ({trained / counted:.2%})",
        "a step": f"{sizes.total:,} rows = {rows}: {about}{plan.tokens:,.0f} tokens",
        "computes in": f"{plan.case.cfg.train.precision.value}, dist={answer.choice('dist')}",
    }
    return settings_table(facts.items(), "plan")


def memory_table(memory: RankMemory, device: str, host: str = "") -> RenderableType:
    """Returns the table of a rank's memory; device: its name; host: what a machine needs of its own, in words."""
    parts = sorted(memory.parts.items(), key=lambda item: -item[1])
    rows: list[tuple[str, str]] = [(name, size_words(size)) for name, size in parts if size]
    step = f"a step ({memory.where})"
    peaks = [("loading", memory.loading), (step, memory.step), ("saving", memory.saving)]
    rows += [(f"peak of {name}", size_words(size)) for name, size in peaks]
    rows += [
        (f"{name}, in the host's memory", size_words(size)) for name, size in memory.host.items() if size
    ]
    if memory.host_saving:
        rows.append(("gathered for a checkpoint, in the host's memory", size_words(memory.host_saving)))
    if host:
        rows.append(("host's memory of a machine", host))
    rows.append(("recomputed layers", described(memory.every)))
    return settings_table(rows, f"memory of a rank: {device}")


def _host(plan: Plan) -> str:
    """Returns what a machine needs of its memory beside what it has, "" where nothing much."""
    memory, host = plan.memory, plan.case.host
    if not plan.on_host or not (memory.host or memory.host_saving):
        return ""
    there = "plan.host=… compares it" if host is None else f"of {size_words(USABLE * host)}"
    return f"{size_words(plan.on_host)}, {there}"


def _devices(answer: Answer, width: int) -> RenderableType:
    columns = ["device", "usable", "needed", "fits", "recomputes", "a step", "the run"]
    rows = []
    for outcome in answer.outcomes:
        plan, seconds, run = outcome.plan, outcome.seconds, outcome.run_seconds
        rows.append(
            (
                plan.case.device.shown,
                *map(size_words, (plan.room, plan.peak)),
                _fits(plan),
                {0: "nothing", 1: "all"}.get(plan.every, f"1 of {plan.every}"),
                "-" if seconds is None else duration(seconds),
                "" if run is None else duration(run),
            )
        )
    styles = ["green" if outcome.plan.fits else "red" for outcome in answer.outcomes]
    fit = fitted(columns, rows, width, whole=columns[1:], spare=["the run", "recomputes"])
    title = "fits, and how long it takes"
    return table(title, fit.columns, fit.rows, fit.columns[1:], styles=styles, widths=fit.widths)


def _fits(plan: Plan) -> str:
    return "yes" if plan.fits else "no" if plan.peak > plan.room else "no: host"


def time_lines(answer: Answer) -> Iterator[str]:
    """Yields the work of a step, and for each device what its time is computed from."""
    found = {outcome.plan.time.flops / 1e12 for outcome in answer.outcomes}
    work = {f"{flops:,.0f}" if flops >= 100 else f"{flops:.3g}" for flops in found}
    yield f"time: a step is {' or '.join(sorted(work))} TFLOP a rank; validating and saving come on top"
    for outcome in answer.outcomes:
        device = outcome.plan.case.device
        unknown = "unknown speed, so no time is given; set plan.tflops=…"
        yield f"  {device.shown}: {outcome.rate.words or unknown}"


def _tasks(data: DataPlan) -> RenderableType:
    columns = ["task", "samples", "epochs", "tokens", "trained", "steps"]
    rows = [
        (
            task.name,
            *(f"{task.samples:,.0f}", f"{task.epochs:.2f}", f"{task.tokens:,.0f}"),
            *(f"{task.trained:,.0f}", f"{task.steps:,.1f}"),
        )
        for task in data.tasks
    ]
    samples = sum(task.samples for task in data.tasks)
    total = (
        *("all", f"{samples:,.0f}", "", f"{data.tokens:,.0f}"),
        *(f"{data.trained:,.0f}", f"{data.steps:,}"),
    )
    title = f"{'about ' * data.about}what the run takes of its tasks ({data.source})"
    return table(title, columns, rows, columns[1:], total=total if len(rows) > 1 else None)


def _advice(answer: Answer, outcome: Outcome, width: int) -> Iterator[tuple[RenderableType, bool]]:
    found, plan = outcome.advice or [], outcome.plan
    best = next((advice for advice in found if advice.plan.fits), None)
    columns = ["set", "needed", "fits", "time", "changes"]
    rows = [
        (
            "\n".join(advice.overrides),
            size_words(advice.plan.peak),
            _fits(advice.plan),
            f"x {advice.slower(plan):.2f}",
            advice.effect or "nothing",
        )
        for advice in found[:ROWS]
    ]
    more = f"; {len(found) - ROWS} more in --json" if len(found) > ROWS else ""
    title = f"what makes it smaller on {plan.case.device.shown}, and what a token then takes{more}"
    styles = ["bold" if advice is best else None for advice in found]
    if rows:
        numbers = ["needed", "fits", "time"]
        # an override is kept whole, so that it can be copied
        longest = max(len(override) for advice in found[:ROWS] for override in advice.overrides)
        others = longest + sum(max(len(row[place]) for row in rows) for place in (1, 2, 3))
        widths = [longest, None, None, None, max(10, width - others - 3 * len(columns) - 1)]
        yield table(title, columns, rows, numbers, styles=styles, widths=widths), False
    yield conclusion(answer, outcome), True


def conclusion(answer: Answer, outcome: Outcome) -> RenderableType:
    """Returns which change is the first that fits, as a command; or that none does, and the smallest."""
    found, plan = outcome.advice or [], outcome.plan
    if best := next((advice for advice in found if advice.plan.fits), None):
        return pasted([("the first that fits", command(answer, best.overrides))], "")
    smallest = min(found, key=lambda advice: advice.plan.peak, default=None)
    needs = f"of the {size_words(plan.room)} that can be used on {plan.case.device.shown}"
    if not plan.host_fits:
        needs += f", and a machine {size_words(plan.on_host)} of its {size_words(plan.case.host or 0)}"
    if smallest is None:
        return pasted([("nothing fits", f"it needs {size_words(plan.peak)} {needs}")], "")
    least = f"{size_words(smallest.plan.peak)} {needs}"
    rows = [
        ("nothing fits", f"the smallest needs {least}"),
        ("smallest", command(answer, smallest.overrides)),
    ]
    return pasted(rows, "")


def command(answer: Answer, change: Sequence[str]) -> str:
    """Returns the command line of a run with a change."""
    anew = {key_of(override) for override in change}
    kept = [override for override in answer.overrides if key_of(override) not in anew]
    return shlex.join(["mft", "train", *answer.options, *kept, *change])


def duration(seconds: float) -> str:
    """Returns a time in words: 12 ms, 4.2 s, 3.4 min, 5.6 h, 2.1 days."""
    if seconds < 1:
        return f"{max(1, round(seconds * 1000)):,} ms"
    for limit, unit, size in ((120, "s", 1), (7200, "min", 60), (172800, "h", 3600)):
        if seconds < limit:
            return f"{seconds / size:.2g} {unit}" if seconds / size < 10 else f"{seconds / size:,.0f} {unit}"
    return f"{seconds / 86400:,.1f} days"
