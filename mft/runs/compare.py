"""`mft compare`: the runs of a folder or of an MLflow experiment, ranked, with the noise between seeds beside it."""

from __future__ import annotations

import csv
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean, stdev

from mft import run_folder
from mft.console.screen import console, say
from mft.errors import UserError, nearest
from mft.runs import results
from mft.runs.apart import differing, shorten_paths
from mft.runs.direction import higher_is_better
from mft.runs.results import Run

SEED = "train.seed"
STANDARD_ERRORS = 2.0
"""A difference of means smaller than so many standard errors counts as noise between seeds."""


@dataclass
class Group:
    """Runs that differ by their seed alone. keys: what tells them from the other groups; higher: whether the highest
    value of the metric is the best one."""

    keys: dict[str, str]
    runs: list[Run]
    metric: str
    higher: bool = False

    @property
    def label(self) -> str:
        """The keys in one line."""
        return " ".join(f"{key}={value}" for key, value in self.keys.items()) or "(all as given)"

    def numbers(self, metric: str = "") -> list[float]:
        """Returns the best value of every run that has one."""
        higher = self.higher and metric in ("", self.metric)  # the others are losses
        return [v for v in (run.best(metric or self.metric, higher) for run in self.runs) if v is not None]

    def mean(self, metric: str = "") -> float:
        """Returns the mean over seeds, NaN without any."""
        values = self.numbers(metric)
        return fmean(values) if values else math.nan

    def spread(self, metric: str = "") -> float | None:
        """Returns the standard deviation between seeds, None below two."""
        values = self.numbers(metric)
        return stdev(values) if len(values) > 1 else None


def grouped(runs: Sequence[Run], keys: Sequence[str], metric: str, higher: bool = False) -> list[Group]:
    """Returns the groups of runs with equal values of the keys, the best mean first; runs without a value come last."""
    groups: dict[tuple[str, ...], list[Run]] = {}
    for run in runs:
        groups.setdefault(tuple(run.values.get(key, "-") for key in keys), []).append(run)
    made = [Group(dict(zip(keys, values, strict=True)), members, metric, higher) for values, members in groups.items()]
    return sorted(made, key=lambda group: (math.isnan(group.mean()), -group.mean() if higher else group.mean()))


def pooled(groups: Sequence[Group]) -> float | None:
    """Returns the standard deviation between seeds, pooled over the groups that have several; None without any."""
    pairs = [(len(group.numbers()) - 1, group.spread()) for group in groups]
    known = [(n, s) for n, s in pairs if s is not None]
    weight = sum(n for n, _ in known)
    return math.sqrt(sum(n * s * s for n, s in known) / weight) if weight else None


def verdicts(groups: Sequence[Group]) -> tuple[list[str], str]:
    """Returns a word for every group and a sentence on the whole; a winner is named only where seeds tell it apart."""
    noise = pooled(groups)
    higher = any(group.higher for group in groups)
    best, better, worse, behind = ("highest", "higher", "lower", -1) if higher else ("lowest", "lower", "higher", 1)
    counts = [len(group.numbers()) for group in groups]
    ranked = [i for i, count in enumerate(counts) if count]
    if not ranked:
        return ["no value"] * len(groups), "No run has a value of this metric yet."
    words = ["no value"] * len(groups)
    words[ranked[0]] = best
    for i in ranked[1:]:
        if noise is None or counts[i] < 2 or counts[ranked[0]] < 2:
            words[i] = (
                "one seed: not told apart" if noise is None or counts[i] < 2 else f"not told apart: {best} has one seed"
            )
            continue
        error = noise * math.sqrt(1 / counts[i] + 1 / counts[ranked[0]])
        within = behind * (groups[i].mean() - groups[ranked[0]].mean()) <= STANDARD_ERRORS * error
        words[i] = "within seed noise" if within else worse
    if noise is None or counts[ranked[0]] < 2:
        return (
            words,
            f"No winner: the {best} mean is of one seed (n = 1). Repeat with train.seed=1,2,3 to know the noise.",
        )
    told = f"Noise between seeds: {noise:.4f} (standard deviation, pooled)."
    if len(ranked) == 1:
        return words, f"{told} One setting only: nothing to compare it with."
    if any(words[i] != worse for i in ranked[1:]):
        near = sum(words[i] != worse for i in ranked[1:])
        more = "one more is" if near == 1 else f"{near} more are"
        return words, f"{told} No winner: {more} not told apart from the {best} (less than 2 standard errors)."
    winner = groups[ranked[0]].label
    return words, f"{told} {winner} is {better} than all others by more than 2 standard errors."


def prepare(runs: Sequence[Run], metric: str, by: Sequence[str], better: str = "") -> list[Group]:
    """Returns the groups to compare; UserError for keys or metrics that no run has, and where it is not known whether
    a lower or a higher value of the metric is better (better: lower or higher, else by its name)."""
    shorten_paths(runs)
    known = sorted({key for run in runs for key in run.values})
    for key in by:
        if key not in known:
            raise UserError(f"--group-by {key}: no run has this key{nearest(key, known) or '.'}")
    keys = list(by) or [key for key in differing(runs) if key != SEED]
    if any(run.rows for run in runs) and not any(run.series(metric) for run in runs):
        options = ["mean", "worst", *dict.fromkeys(k for run in runs for row in run.rows for k in row)]
        raise UserError(f"--metric {metric}: no run has logged it{nearest(metric, options) or '.'}")
    tasks = [task for run in runs for task in run.tasks]
    return grouped(runs, keys, metric, higher_is_better(metric, tasks, better))


def columns(groups: Sequence[Group], metric: str) -> tuple[list[str], list[list[str]]]:
    """Returns the head and the rows of the ranked table, as text."""
    tasks = list(dict.fromkeys(task for group in groups for run in group.runs for task in run.tasks))
    keys = list(groups[0].keys) if groups else []
    head = [
        "rank",
        *keys,
        "n",
        metric,
        "spread",
        *(["worst"] if metric != "worst" else []),
        *tasks,
        "seconds",
        "GiB",
        "verdict",
    ]
    words, _ = verdicts(groups)
    rows = []
    for rank, (group, word) in enumerate(zip(groups, words, strict=True), start=1):
        spread = group.spread()
        row = [str(rank), *group.keys.values(), str(len(group.numbers())), _number(group.mean())]
        row.append("n = 1" if spread is None else f"± {spread:.4f}")
        row += [_number(group.mean(m)) for m in ([] if metric == "worst" else ["worst"]) + tasks]
        row += [
            _mean([run.seconds for run in group.runs], ".0f"),
            _mean([run.memory for run in group.runs], ".2f"),
            word,
        ]
        rows.append(row)
    return head, rows


def _number(value: float) -> str:
    return "" if math.isnan(value) else f"{value:.4f}"


def _mean(values: Sequence[float | None], how: str) -> str:
    known = [value for value in values if value is not None]
    return format(fmean(known), how) if known else ""


def leave_report(folder: Path) -> Path | None:
    """Writes `report.html` into the folder of a sweep, of what is finished there; None where nothing has a value."""
    from mft.runs.report import write

    runs = [results.read_run(path) for path in run_folder.runs_under(folder)]
    runs = [run for run in runs if run.best("mean") is not None]
    if not runs:
        return None
    return write(prepare(runs, "mean", ()), "mean", folder / "report.html", str(folder.name))


def command(args: Sequence[str]) -> None:
    """mft compare DIR [DIR …] | EXPERIMENT [--metric mean|worst|TASK|NAME] [--better lower|higher] [--group-by KEY,KEY]
             [--csv FILE] [--out FILE] [--uri ADDRESS]

    Ranks the runs in folders (multirun/<name>, one sweep, outputs/<name>) or of an MLflow experiment, by their lowest
    validation loss, and writes a report with pictures (report.html in the folder; --out says where). Of metrics that
    are called accuracy, f1, pass@1, tokens_per_second and the like the highest value is the best; --better says it for
    names that do not tell.
    """
    from rich.table import Table

    from mft.runs.report import write

    if not args or "-h" in args or "--help" in args:
        print(command.__doc__)
        return
    places, chosen = options(args)
    runs = [run for place in places for run in results.at(place, chosen["uri"], chosen["metric"])]
    if not runs:
        raise UserError(f"There is no run in {', '.join(places)}.")
    by = [key for key in chosen["group-by"].split(",") if key]
    groups = prepare(runs, chosen["metric"], by, chosen["better"])
    head, rows = columns(groups, chosen["metric"])
    table = Table(title=f"{len(runs)} runs, {len(groups)} settings", title_justify="left")
    for name in head:
        table.add_column(name, overflow="fold")
    for row in rows:
        table.add_row(*row)
    terminal = console()
    terminal.print(table) if terminal.is_terminal else console(width=200).print(table)
    say(verdicts(groups)[1])
    unfinished = [f"{run.name} ({run.state})" for run in runs if run.state != "finished"]
    if unfinished:
        say(f"not finished, counted as far as they came: {', '.join(unfinished)}")
    if chosen["csv"]:
        with open(chosen["csv"], "w", newline="", encoding="utf-8") as file:
            csv.writer(file).writerows([head, *rows])
        say(f"table: {chosen['csv']}")
    first = Path(places[0])
    out = Path(chosen["out"]) if chosen["out"] else (first if first.is_dir() else Path(".")) / "report.html"
    say(f"report: {write(groups, chosen['metric'], out, ', '.join(places))}")


def options(args: Sequence[str]) -> tuple[list[str], dict[str, str]]:
    """Splits the command line into places and flags; UserError for a flag that is none, or has no value."""
    chosen = {"metric": "mean", "better": "", "group-by": "", "csv": "", "out": "", "uri": ""}
    places, rest = [], list(args)
    while rest:
        arg = rest.pop(0)
        if not arg.startswith("--"):
            places.append(arg)
            continue
        name, equals, value = arg[2:].partition("=")
        if name not in chosen:
            raise UserError(
                f"mft compare has no --{name}{nearest(name, chosen) or '.'} Flags: --{', --'.join(chosen)}."
            )
        if not equals and not rest:
            raise UserError(f"--{name} needs a value.")
        chosen[name] = value if equals else rest.pop(0)
    if not places:
        raise UserError("mft compare needs a folder or the name of an MLflow experiment.")
    return places, chosen
