"""The description of a run on MLflow's page: what `mft show` says of it, as Markdown.

All text of the run stands in blocks of code, which it cannot end: a task, path or override is never structure
of the page. Markdown's own tables have no space between columns there.
"""

from __future__ import annotations

import shlex
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from mft.console.credentials import hidden
from mft.console.markdown import fenced
from mft.files.json_file import Values, read_json
from mft.tracking.params import TAG_LIMIT, cut

FILES = {
    "run folder": "",
    "model": "final",
    "checkpoints": "checkpoints",
    "metrics": "metrics.jsonl",
    "pictures": "report",
    "profile": "profile",
    "output": "log/output.txt",
    "traceback": "log/traceback.txt",
}
"""What is named of a run folder, where it is there."""

TASKS_SHOWN = 20
CELL = 160  # characters
LONGEST = TAG_LIMIT // 4  # characters of each part
LOSS = "valid/loss"


def note(run_dir: Path, outcome: str, config: Mapping[str, Any]) -> str:
    """Returns the description of a run, "" for a folder that is none (without a config).

    outcome: "" while it is running.
    """
    if not config:
        return ""
    record, summary = read_json(run_dir / "overrides.json"), read_json(run_dir / "summary.json")
    provenance = read_json(run_dir / "provenance.json")
    summary = summary if outcome else Values()  # of an earlier attempt
    overrides, folder = record.texts("overrides"), run_dir.resolve()
    settings = [override.partition("=")[::2] for override in overrides]
    files = [("started in", record.text("folder"))] if record.text("folder") else []
    files += [(name, str(folder / file)) for name, file in FILES.items() if (folder / file).exists()]
    parts = {"error": summary.text("error"), "losses": _losses(summary), "settings given": _table(settings)}
    choices = [(str(group), str(choice)) for group, choice in (config.get("choices") or {}).items()]
    parts |= {
        "options chosen": _table(choices),
        "files": _table(files),
        "command": provenance.text("command") or shlex.join(["mft", "train", *overrides]),
    }
    text = _state(summary, outcome)
    for title, part in parts.items():
        more = f"\n\n**{title}**\n{fenced(cut(hidden(part), LONGEST))}"
        if part and len(text) + len(more) <= TAG_LIMIT:  # whole: an open block would swallow the rest
            text += more
    return text


def _state(summary: Values, outcome: str) -> str:
    state = f"**{outcome or 'running'}**"
    steps, total = summary.number("steps"), summary.number("total_steps")
    if steps is not None:
        state += f", {steps:,.0f} of {total:,.0f} steps" if total else f", {steps:,.0f} steps"
    if (seconds := summary.number("seconds")) is not None:
        state += f", took {seconds:,.0f} s"
    if (memory := summary.number("peak_memory_gib")) is not None:
        state += f" and {memory:.1f} GiB at most"
    if (speed := summary.part("speed").number("tokens_per_second")) is not None:
        state += f", {speed:,.0f} tokens/s"
    return state


def _losses(summary: Values) -> str:
    """Returns a table of losses with a line for each task, "" without validation."""
    columns = {title: summary.part(title) for title in ("first", "last", "best")}
    names = [name for name in columns["last"] if name == LOSS or name.startswith(f"{LOSS}/")]
    if test := summary.part("test"):
        columns["test"] = Values({name.replace("test/", "valid/", 1): loss for name, loss in test.items()})
        columns["test"]["step"] = test.get("step")
    rows = []
    for name in names[: TASKS_SHOWN + 1]:
        values = (column.number(name) for column in columns.values())
        cells = ("-" if value is None else f"{value:.4f}" for value in values)
        rows.append((name.removeprefix(LOSS).lstrip("/") or "mean of tasks", *cells))
    if len(names) > len(rows):
        rows.append((f"and {len(names) - len(rows)} more tasks", *["" for _ in columns]))
    steps = {title: column.number("step") for title, column in columns.items()}
    heads = [title if step is None else f"{title} (step {step:.0f})" for title, step in steps.items()]
    return _table(rows, ["task", *heads]) if rows else ""


def _table(rows: Iterable[Sequence[str]], head: Sequence[str] = ()) -> str:
    """Returns aligned columns, a line for each row."""
    from tabulate import tabulate

    lines = [[cut(" ".join(cell.split()), CELL) for cell in row] for row in rows]
    return tabulate(lines, head, tablefmt="plain", disable_numparse=True)
