"""The description of a run on MLflow's page: what `mft show` says of it, as Markdown.

All text of the run is escaped: a task, path or override is never structure of the page.
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterable, Sequence
from pathlib import Path

from mft.console.credentials import hidden
from mft.files.json_file import Values, read_json
from mft.tracking.params import TAG_LIMIT, cut

FILES = {
    "model": "final",
    "checkpoints": "checkpoints",
    "metrics": "metrics.jsonl",
    "pictures": "report",
    "output": "log/output.txt",
    "traceback": "log/traceback.txt",
}
TASKS_SHOWN = 20
CELL = 160  # characters
PREFIX = "valid/loss"
LOSSES = {"first": "first", "last": "last", "best": "best"}

_STRUCTURE = re.compile(r"[^\w\s,/=%-]|(?<=www)\.", re.ASCII)
_SPACE = re.compile(r"\s+")


def note(run_dir: Path, outcome: str) -> str:
    """Returns the description of a run, "" for a folder that is none. outcome: "" while it is running."""
    if not (run_dir / "config.yaml").exists():
        return ""
    record, summary = read_json(run_dir / "overrides.json"), read_json(run_dir / "summary.json")
    summary = summary if outcome else Values()  # of an earlier attempt
    parts = [_state(summary, outcome)]
    if error := summary.text("error"):
        parts.append(fenced(error))
    parts += _losses(summary)
    if settings := [override.partition("=")[::2] for override in record.texts("overrides")]:
        parts += ["#### Settings given", _table(("key", "value"), settings)]
    files = [
        (name, str(run_dir.resolve() / file)) for name, file in FILES.items() if (run_dir / file).exists()
    ]
    parts += ["#### Files", _table(("", "path"), [("run folder", str(run_dir.resolve())), *files])]
    parts += ["#### Command", fenced(shlex.join(["mft", "train", *record.texts("overrides")]))]
    kept = [parts.pop(0)]
    for part in parts:  # a part is left out whole: half a table or an open fence would spoil the page
        if len("\n\n".join([*kept, part])) <= TAG_LIMIT:
            kept.append(part)
    return "\n\n".join(kept)


def escaped(text: str) -> str:
    """Returns text as Markdown that shows it as it is, on one line, in a cell of a table as well.

    Characters that could be structure or make a link become HTML entities, which every Markdown takes;
    backslashes are not taken before all of them.
    """
    line = _SPACE.sub(" ", hidden(text)).strip()
    line = "".join(character for character in line if character.isprintable())
    return _STRUCTURE.sub(lambda match: f"&#{ord(match[0])};", cut(line, CELL))


def fenced(text: str) -> str:
    """Returns text as a block of code, which no backticks in it can end."""
    text = cut(hidden(text).replace("\r", "\n"), TAG_LIMIT // 4)
    longest = max((len(run) for run in re.findall("`+", text)), default=0)
    fence = "`" * max(3, longest + 1)
    return f"{fence}\n{text}\n{fence}"


def _state(summary: Values, outcome: str) -> str:
    state = f"**{outcome or 'running'}**"
    steps, total = summary.number("steps"), summary.number("total_steps")
    if steps is not None:
        state += f", {steps:,.0f} of {total:,.0f} steps" if total else f", {steps:,.0f} steps"
    if (seconds := summary.number("seconds")) is not None:
        state += f", took {seconds:,.0f} s"
    if (memory := summary.number("peak_memory_gib")) is not None:
        state += f" and {memory:.1f} GiB at most"
    return state


def _losses(summary: Values) -> list[str]:
    """Returns a table of validation losses, a row for each task; [] without validation."""
    parts = {title: summary.part(key) for title, key in LOSSES.items()}
    if (step := parts["best"].number("step")) is not None:
        parts[f"best (step {step:.0f})"] = parts.pop("best")
    names = [name for name in parts["last"] if name == PREFIX or name.startswith(f"{PREFIX}/")]
    tests = summary.part("test")
    if tests:
        tested = tests.number("step")
        parts["test" if tested is None else f"test (step {tested:.0f})"] = Values(
            {name.replace("test/", "valid/", 1): value for name, value in tests.items()}
        )
    if not names:
        return []
    rows = []
    for name in names[: TASKS_SHOWN + 1]:
        values = (part.number(name) for part in parts.values())
        cells = ["-" if value is None else f"{value:.4f}" for value in values]
        rows.append((name.removeprefix(PREFIX).lstrip("/") or "mean of tasks", *cells))
    more = len(names) - len(rows)
    return ["#### Losses", _table(("task", *parts), rows), *([f"and {more} more tasks"] if more else [])]


def _table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *([escaped(cell) for cell in row] for row in rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)
