"""Runs ranked by setting: runs that differ by their seed alone are one, and their spread is the noise."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean, stdev

from mft.errors import UserError, nearest
from mft.runs.differences import differing, shorten_paths
from mft.runs.direction import higher_is_better
from mft.runs.results import Run

SEED = "train.seed"

STANDARD_ERRORS = 2.0
"""A difference of means smaller than so many standard errors counts as noise between seeds."""


@dataclass
class Group:
    """One setting: runs that differ by their seed alone."""

    keys: dict[str, str]
    """The values that tell it from the other groups."""

    runs: list[Run]
    """One run a seed."""

    metric: str
    """What the runs are ranked by."""

    higher: bool = False
    """Whether the highest value of the metric is the best one."""

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
    """Returns the groups of runs with equal values of the keys, the best mean first, without any last."""
    members: dict[tuple[str, ...], list[Run]] = {}
    for run in runs:
        members.setdefault(tuple(run.values.get(key, "-") for key in keys), []).append(run)
    groups = [Group(dict(zip(keys, key, strict=True)), of, metric, higher) for key, of in members.items()]
    sign = -1 if higher else 1
    return sorted(groups, key=lambda group: (math.isnan(group.mean()), sign * group.mean()))


def pooled(groups: Sequence[Group]) -> float | None:
    """Returns the standard deviation between seeds, pooled over groups that have several; None without.

    Pooled by degrees of freedom: a group of n seeds counts n - 1 times.
    """
    pairs = [(len(group.numbers()) - 1, group.spread()) for group in groups]
    several = [(freedom, spread) for freedom, spread in pairs if spread is not None]
    weight = sum(freedom for freedom, _ in several)
    return math.sqrt(sum(n * spread * spread for n, spread in several) / weight) if weight else None


def verdicts(groups: Sequence[Group]) -> tuple[list[str], str]:
    """Returns a verdict for every group and a sentence on all of them.

    A winner is named only where the noise between seeds is known and every other group lies further away than
    it. groups: as `grouped` orders them, the best mean first.
    """
    noise = pooled(groups)
    higher = any(group.higher for group in groups)
    lowest_wins, highest_wins = ("lowest", "lower", "higher", 1), ("highest", "higher", "lower", -1)
    best, better, worse, sign = highest_wins if higher else lowest_wins
    counts = [len(group.numbers()) for group in groups]
    ranked = [i for i, count in enumerate(counts) if count]
    words = ["no value"] * len(groups)
    if not ranked:
        return words, "No run has a value of this metric yet."
    first, *others = ranked
    words[first] = best
    for i in others:
        if noise is None or counts[i] < 2:
            words[i] = "one seed: not told apart"
        elif counts[first] < 2:
            words[i] = f"not told apart: {best} has one seed"
        else:
            # The standard error of a difference of two means, each over its own number of seeds.
            error = noise * math.sqrt(1 / counts[i] + 1 / counts[first])
            behind = sign * (groups[i].mean() - groups[first].mean())
            words[i] = "within seed noise" if behind <= STANDARD_ERRORS * error else worse
    # One run says nothing about its own noise, however far ahead it is.
    if noise is None or counts[first] < 2:
        hint = "Repeat with train.seed=1,2,3 to know the noise."
        return words, f"No winner: the {best} mean is of one seed (n = 1). {hint}"
    sentence = f"Noise between seeds: {noise:.4f} (standard deviation, pooled)."
    if not others:
        return words, f"{sentence} One setting only: nothing to compare it with."
    if near := sum(words[i] != worse for i in others):
        more = "one more is" if near == 1 else f"{near} more are"
        return words, f"{sentence} No winner: {more} within 2 standard errors of the {best}."
    winner = groups[first].label
    return words, f"{sentence} {winner} is {better} than all others by more than 2 standard errors."


def prepare(runs: Sequence[Run], metric: str, by: Sequence[str], better: str = "") -> list[Group]:
    """Returns the groups to compare.

    by: the keys that make a group; () for all that differ, but the seed. better: lower or higher; "" to read
    it from the metric's name. Raises UserError for keys or metrics that no run has, and where the name does
    not tell.
    """
    shorten_paths(runs)  # before keys become labels of groups
    keys_of_runs = sorted({key for run in runs for key in run.values})
    for key in by:
        if key not in keys_of_runs:
            raise UserError(f"--group-by {key}: no run has this key{nearest(key, keys_of_runs) or '.'}")
    keys = list(by) or [key for key in differing(runs) if key != SEED]
    if any(run.rows for run in runs) and not any(run.series(metric) for run in runs):
        metrics = ["mean", "worst", *dict.fromkeys(name for run in runs for row in run.rows for name in row)]
        raise UserError(f"--metric {metric}: no run logged this metric{nearest(metric, metrics) or '.'}")
    tasks = [task for run in runs for task in run.tasks]
    return grouped(runs, keys, metric, higher_is_better(metric, tasks, better))


def columns(groups: Sequence[Group], metric: str) -> tuple[list[str], list[list[str]]]:
    """Returns the head and the rows of the ranked table, as text."""
    tasks = list(dict.fromkeys(task for group in groups for run in group.runs for task in run.tasks))
    keys = list(groups[0].keys) if groups else []
    losses = [*(["worst"] if metric != "worst" else []), *tasks]
    head = ["rank", *keys, "n", metric, "spread", *losses, "seconds", "GiB", "verdict"]
    words, _ = verdicts(groups)
    rows = []
    for rank, (group, word) in enumerate(zip(groups, words, strict=True), start=1):
        spread = group.spread()
        row = [str(rank), *group.keys.values(), str(len(group.numbers())), _mean(group.numbers(), ".4f")]
        row.append("n = 1" if spread is None else f"± {spread:.4f}")
        row += [_mean(group.numbers(loss), ".4f") for loss in losses]
        row.append(_mean([run.seconds for run in group.runs], ".0f"))
        row.append(_mean([run.memory for run in group.runs], ".2f"))
        rows.append([*row, word])
    return head, rows


def _mean(values: Sequence[float | None], spec: str) -> str:
    measured = [value for value in values if value is not None]
    return format(fmean(measured), spec) if measured else ""
