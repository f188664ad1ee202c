"""Whether a run ended as the run without a fault did: weights, metrics, losses of samples, summary."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from mft.files.checksums import MODEL, damage
from mft.training.metrics import CLOCKED

MEASURED = ("seconds", "peak_memory_gib", "speed", "phases")
"""What depends on the clock and the machine in summary.json."""


def differences(
    reference: Path, run: Path, losable: bool = False, intact: Sequence[dict[str, Any]] = ()
) -> list[str]:
    """Returns in what a finished run differs from its reference, [] where in nothing that counts.

    losable: whether rows of metrics.jsonl were destroyed from outside: those that are there must still be
    right, and in order, unless the run has told that they are not. intact: rows that were not destroyed, so
    that they must be there.
    """
    found = _final(reference / "final", run / "final")
    expected, actual = rows(reference), rows(run)
    if losable:
        kept = iter(expected)
        wrong = (
            [] if told(run, "metrics.jsonl has changed since") else [row for row in actual if row not in kept]
        )
        found += [f"metrics.jsonl: a row that is not expected: {row}" for row in wrong]
        found += [f"metrics.jsonl: an intact row is lost: {row}" for row in intact if row not in actual]
        expected_last, actual_last = expected[-1:], actual[-1:]
        found += [] if expected_last == actual_last else ["metrics.jsonl: another last row"]
    elif expected != actual:
        pairs = zip(expected, actual, strict=False)
        line = next((n for n, (a, b) in enumerate(pairs, 1) if a != b), min(len(expected), len(actual)) + 1)
        found.append(f"metrics.jsonl: line {line} differs ({len(actual)} lines, expected {len(expected)})")
    found += _sample_losses(reference, run)
    summaries = _summary(reference), _summary(run)
    for name in sorted(summaries[0].keys() | summaries[1].keys()):
        expected_value, value = summaries[0].get(name), summaries[1].get(name)
        if expected_value != value:
            found.append(f"summary.json: {name} is {value}, expected {expected_value}")
    return found


def told(run: Path, what: str) -> bool:
    """Whether a run has said something, in these words."""
    log = run / "log" / "rank0.log"
    return log.exists() and what in " ".join(log.read_text(errors="replace").split())


def rows(run: Path) -> list[dict[str, Any]]:
    """Returns the rows of metrics.jsonl without what depends on the clock; a damaged line as its text."""
    found = []
    for line in filter(None, _lines(run)):
        row = _object(line) or {"unreadable": line}
        found.append({name: value for name, value in row.items() if not name.startswith(CLOCKED)})
    return found


def _lines(run: Path) -> list[str]:
    path = run / "metrics.jsonl"
    return path.read_text(encoding="utf-8", errors="replace").split("\n") if path.exists() else []


def _object(line: str) -> dict[str, Any] | None:
    try:
        row = json.loads(line)
    except ValueError:
        return None
    return row if isinstance(row, dict) else None


def _final(reference: Path, final: Path) -> list[str]:
    expected, actual = ({path.name for path in folder.glob("*")} for folder in (reference, final))
    found = [f"final/{name} is missing" for name in sorted(expected - actual)]
    found += [f"final/{name} is not expected" for name in sorted(actual - expected)]
    if actual and (problem := damage(final)):
        found.append(f"final/: {problem}")
    for name in sorted(expected & actual - {MODEL}):
        if _without_places(reference / name) != _without_places(final / name):
            found.append(f"final/{name} differs")
    return found


def _without_places(path: Path) -> bytes:
    """Returns the content of a file of final/ without the folder of the cache, which a case may have of its
    own."""
    content = path.read_bytes()
    return content if path.suffix == ".safetensors" else re.sub(rb"/[^\s\"'`]*/tiny/", b"", content)


def _sample_losses(reference: Path, run: Path) -> list[str]:
    expected = {path.name: path.read_bytes() for path in (reference / "sample_losses").glob("*")}
    actual = {path.name: path.read_bytes() for path in (run / "sample_losses").glob("*")}
    found = [
        f"sample_losses/{name} differs"
        for name, content in expected.items()
        if actual.get(name, content) != content
    ]
    # Those that were the best as of some checkpoint may stay, too: which ones depends on where a run stopped.
    steps = sorted(row["step"] for row in rows(reference) if "valid/loss" in row)
    best = _summary(reference)["best"]["step"]
    needed = {f"valid-{step}.parquet" for step in (steps[0], best, steps[-1])}
    needed |= {name for name in expected if name.startswith("test-")}
    # a disk that does not take them ends no training: then it is said
    lost = [name for name in sorted(needed - actual.keys()) if not told(run, f"{name} was not written")]
    return found + [f"sample_losses/{name} is missing" for name in lost]


def _summary(run: Path) -> dict[str, Any]:
    try:
        values = json.loads((run / "summary.json").read_text())
    except (OSError, ValueError):
        return {}
    text = json.dumps({name: value for name, value in values.items() if name not in MEASURED})
    return json.loads(re.sub(r'"/[^"]*/(checkpoints|final)', r'"\1', text))  # type: ignore[no-any-return]
