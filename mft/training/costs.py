"""What a run took, of all its ranks and parts: speeds, waiting for data, time and peak memory by phase; and
the tables that show it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from mft.console.tables import settings_table, table
from mft.files.json_file import Values
from mft.tracking.base import TOTAL
from mft.training.memory import PEAKS
from mft.training.phases import Phase
from mft.training.speed import rates
from mft.training.trainer import Trainer

if TYPE_CHECKING:
    from rich.table import Table

LOGGED_SPEEDS = (
    "tokens_per_second",
    "all_tokens_per_second",
    "trained_tokens_per_second",
    "mfu",
    "hfu",
    "data_wait_share",
)
"""What a tracker gets of the run's speed; the rest of summary.json follows from it and the totals."""

LOGGED_PEAKS = (Phase.loading, Phase.training, Phase.validation, Phase.saving)
"""Phases whose memory a tracker gets."""


def of_run(t: Trainer) -> dict[str, Any]:
    """Returns the part of summary.json about what the run took. Its state holds the time of all ranks.

    Time is that of the slowest rank, memory that of the largest one, each with the rank's number.
    """
    ranks = t.state.costs
    peaks = {
        phase: {rank: part["peaks"][phase] for rank, part in enumerate(ranks) if part["peaks"].get(phase)}
        for phase in Phase
    }
    largest = max((peak[0] for of in peaks.values() for peak in of.values()), default=0)
    by_phase = {}
    for phase in Phase:
        if not any(phase in part["seconds"] for part in ranks):
            continue  # such as answers where nothing is asked
        seconds = {rank: part["seconds"].get(phase, 0.0) for rank, part in enumerate(ranks)}
        slowest = max(seconds, key=lambda rank: seconds[rank])
        found: dict[str, Any] = {"seconds": round(seconds[slowest], 3), "slowest_rank": slowest}
        if peaks[phase] and all(part["resets"] for part in ranks):
            rank = max(peaks[phase], key=lambda rank: peaks[phase][rank][0])
            found |= {
                name: round(peak / 2**30, 3) for name, peak in zip(PEAKS, peaks[phase][rank], strict=False)
            }
            found["largest_rank"] = rank
        by_phase[str(phase)] = found
    return {"peak_memory_gib": round(largest / 2**30, 3), "speed": _speed(t), "phases": by_phase}


def _speed(t: Trainer) -> dict[str, Any]:
    """Returns means over the training steps of the run; {} where none was measured."""
    state, ranks = t.state, t.state.costs
    seconds = ranks[0]["seconds"].get(Phase.training, 0.0)  # ranks go through steps together
    steps, tokens = state.step - state.unmeasured[0], state.tokens - state.unmeasured[1]
    if not steps:
        return {}
    waiting = max(range(len(ranks)), key=lambda rank: ranks[rank]["waited"])
    waited, peak = ranks[waiting]["waited"], t.meter.work.peak
    found = rates(tokens, state.positions, state.trained, seconds)
    found |= {
        "seconds_per_step": seconds / steps,
        "data_wait_seconds": waited,
        "data_wait_share": waited / seconds,
    }
    found |= t.meter.work.utilization(tokens, ranks[0]["device_seconds"])
    rounded = {name: float(f"{value:.4g}") for name, value in found.items()}
    return rounded | {
        "data_wait_rank": waiting,
        "peak_tflops": peak.tflops or None,
        "peak_source": peak.source,
    }


def metrics(summary: dict[str, Any]) -> dict[str, float]:
    """Returns the numbers of `of_run` as they are logged with the last row of a finished run.

    A tracker shows names that differ in their last part side by side: here, the phases.
    """
    speed, phases = summary["speed"], summary["phases"]
    row = {f"speed/run/{name}": speed[name] for name in LOGGED_SPEEDS if name in speed}
    row[f"{TOTAL}peak_memory_gib"] = summary["peak_memory_gib"]
    row |= {f"{TOTAL}seconds/{phase}": found["seconds"] for phase, found in phases.items()}
    known = {phase: phases[phase] for phase in LOGGED_PEAKS if phase in phases}
    for name in PEAKS:
        row |= {f"memory/{name}/{phase}": found[name] for phase, found in known.items() if name in found}
    return row


def tables(summary: Values) -> list[Table]:
    """Returns what is shown of a summary.json, [] where it is of a version that did not measure it."""
    speed, phases, ranks = summary.part("speed"), summary.part("phases"), summary.number("ranks") or 1
    found = [settings_table(rows, "Training")] if (rows := _speed_rows(speed, ranks > 1)) else []
    return [*found, _phase_table(phases, ranks > 1)] if phases else found


def _speed_rows(speed: Values, named: bool) -> list[tuple[str, str]]:
    """named: whether ranks are."""
    names = ("tokens_per_second", "all_tokens_per_second", "trained_tokens_per_second")
    useful, padded, trained = (speed.number(name) for name in names)
    rows = []
    if useful is not None and padded is not None and trained is not None:
        rows.append(("tokens/s", f"{useful:,.0f}; {padded:,.0f} with padding; {trained:,.0f} with loss"))
    mfu, hfu, peak = (speed.number(name) for name in ("mfu", "hfu", "peak_tflops"))
    source = speed.text("peak_source")
    if mfu is not None and hfu is not None and peak is not None:
        rows.append(("MFU, HFU", f"{mfu:.1%}, {hfu:.1%} of {peak:g} TFLOP/s a device ({source})"))
    elif source:
        rows.append(("MFU, HFU", source))
    waited, share = speed.number("data_wait_seconds"), speed.number("data_wait_share")
    if waited is not None and share is not None:
        rank = f", rank {speed.number('data_wait_rank') or 0:.0f}" if named else ""
        rows.append(("waiting for data", f"{share:.2%} of the steps' time ({waited:,.3f} s{rank})"))
    return rows


def _phase_table(phases: Values, named: bool) -> Table:
    parts = {name: phases.part(name) for name in phases}
    total = sum(part.number("seconds") or 0.0 for part in parts.values())
    on_gpu = any("reserved_gib" in part for part in parts.values())
    columns = {"seconds": "seconds", "share": "share"} | ({"slowest_rank": "slowest"} if named else {})
    measured = any("peak_gib" in part for part in parts.values())
    if measured:
        columns |= (
            {"peak_gib": "allocated", "reserved_gib": "reserved"} if on_gpu else {"peak_gib": "resident"}
        )
        columns |= {"largest_rank": "largest"} if named else {}
    rows: list[Sequence[str]] = []
    for name, part in parts.items():
        share = (part.number("seconds") or 0.0) / (total or 1.0)
        texts = {"share": f"{share:.0%}"} | {key: _shown(part.number(key), key) for key in part}
        rows.append([name, *(texts.get(key, "-") for key in columns)])
    title = "Time by phase (its memory is not known here)"
    if measured:
        title = "Time and peak memory (GiB) by phase"
    if measured and named:
        title = "By phase: time of the slowest rank, peak GiB of the largest"
    return table(title, ["phase", *columns.values()], rows, columns.values())


def _shown(value: float | None, name: str) -> str:
    if value is None:
        return "-"
    return f"{value:.2f}" if name.endswith("gib") else f"{value:.1f}" if name == "seconds" else f"{value:.0f}"
