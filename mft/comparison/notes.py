"""What a reader has to know beside the numbers of a comparison: what was left out, and what differs."""

from __future__ import annotations

from mft.comparison.baseline import SingleTasks
from mft.comparison.compare import DETAILED, Comparison
from mft.comparison.statistics import Covers
from mft.runs.results import DATA

MOST_NAMED = 5
"""Runs that a note names."""


def notes(result: Comparison) -> list[str]:
    """Returns what a reader of the numbers has to know."""
    found, count = [], len(result.runs)
    if result.other_tasks and result.tasks:
        left = ", ".join(f"{task} ({n} of {count} runs)" for task, n in result.other_tasks.items())
        found.append(f"Mean and worst are taken over the tasks that all runs have; left out: {left}.")
    elif result.other_tasks and result.metric.name in ("mean", "worst"):
        found.append("No task was validated by all runs: choose one with --metric TASK.")
    if isinstance(result.reference, SingleTasks):
        without = [task for task in result.tasks if task not in result.reference.parts]
        if without:
            found.append(f"No run was trained on these tasks alone: {', '.join(without)}.")
    if len(result.pairing) > 1:
        paired_by = " and ".join(result.pairing)
        found.append(f"Runs are paired by {paired_by}; intervals take the pairs as independent.")
    found += _seeds_left_out(result) + _rows_that_differ(result)
    judged = [one for setting in result.every_setting for one in setting.judged]
    before = sum(one.step == 0 and max(one.losses) > 0 for one in judged)
    if before:
        found.append(f"The best validation of {_runs(before)} is the one before training.")
    validated = [one for one in judged if one.step is not None and one.run.test]
    other = sum(one.run.test_step not in (None, one.step) for one in validated)
    if other:
        found.append(
            f"Test losses of {_runs(other)} are of another step than their validation losses: the best "
            "checkpoint by train.best, which need not be the best validation by the metric that ranks."
        )
    again = sum(len(of_block) - 1 for setting in result.settings for of_block in setting.blocks.values())
    if again:
        what = "repeats" if again == 1 else "repeat"
        found.append(
            f"{_runs(again)} {what} a seed of the setting; a seed counts once, with the mean of its runs."
        )
    return found


def _seeds_left_out(result: Comparison) -> list[str]:
    """Returns what is said where means are not over the same seeds, or not over all runs of a setting."""
    notes, metric, ranked = [], result.metric, result.ranked
    blocks = [frozenset(setting.values(metric)) for setting in result.every_setting]
    if len(set(filter(None, blocks))) > 1:
        what = "seeds" if len(result.pairing) == 1 else "pairs"
        notes.append(
            f"Not all settings have the same {what}: means are over those of each, differences over those in "
            "common."
        )
    partly = [s for s in ranked if len(s.values(metric)) < len(s.judged)]
    missing = [one.run for setting in partly for one in setting.judged if one.value(metric) is None]
    if missing:
        names = ", ".join(f"{run.name} ({run.state})" for run in missing[:MOST_NAMED])
        more = f" and {len(missing) - MOST_NAMED:,} more" if len(missing) > MOST_NAMED else ""
        notes.append(f"Without a value, and not counted in their settings: {names}{more}.")
    return notes


def _rows_that_differ(result: Comparison) -> list[str]:
    """Returns what is said where a difference may be one of the validation rows."""
    notes, reference = [], result.reference
    if reference is None:
        return []
    what = "the baseline" if result.baseline else "the best one"
    known = [(s, d) for s, d in zip(result.settings, result.differences, strict=True) if d is not None]
    common = sum(d.other_rows and d.rows > 0 for _, d in known)
    if common:
        notes.append(
            f"{_settings(common)} validated on other rows than {what}; differences are of the rows in common."
        )
    apart = sum(d.other_rows and d.rows == 0 for _, d in known)
    if apart:
        notes.append(
            f"{_settings(apart)} validated on other rows than {what}, with fewer than two of a task in "
            "common: differences are of the rows as well."
        )
    data = {one.run.values.get(DATA) for one in reference.judged}
    unknown = [
        s
        for s, d in known
        if d.rows == 0 and not d.other_rows and {one.run.values.get(DATA) for one in s.judged} != data
    ]
    if unknown and not isinstance(reference, SingleTasks):
        notes.append(
            f"{_settings(len(unknown))} trained on other data than {what}, and the losses of single rows are "
            "not at hand: whether the validation rows were the same is not known."
        )
    tokens = sum(d.other_tokens for _, d in known)
    if tokens:
        notes.append(
            f"{_settings(tokens)} validated on other tokens of the same rows than {what} (tokenizer, "
            "template or limit of length): losses per token are of different tokens."
        )
    later = any(d is not None for d in result.differences[DETAILED:])
    if later and any(d.covers in (Covers.both, Covers.rows) for _, d in known):
        notes.append(
            f"Losses of single rows are read of the best {DETAILED} settings; others have seeds alone."
        )
    return notes


def _runs(count: int) -> str:
    return "1 run" if count == 1 else f"{count:,} runs"


def _settings(count: int) -> str:
    return "1 setting was" if count == 1 else f"{count:,} settings were"
