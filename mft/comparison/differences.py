"""Which settings tell runs apart: values, options of groups, and the contents of what was read."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence

from mft.config.identity import EXTENDABLE
from mft.runs.results import FINGERPRINT, Run

READABLE = {
    "data": ("data.paths", "task"),
    "base model": ("model.path", "model"),
    "tokenizer": ("model.path", "model"),
    "code": ("model.path", "model"),
    "adapter": ("peft.path",),
    "template": ("data.template",),
}
"""Contents that tell settings apart → keys that may say the same in a readable way."""


def differing_contents(runs: Sequence[Run]) -> list[str]:
    """Returns the keys that tell apart runs on different tasks, data, base models, adapters or templates.

    The readable key is taken where it says exactly the same as the fingerprint. Where it says less (the files
    behind a path have changed), the fingerprint stands beside it. Paths to equal contents tell nothing apart.
    """
    telling: dict[str, None] = {}  # a set that keeps its order
    for name, readable in READABLE.items():
        fingerprint = f"{name}{FINGERPRINT}"
        contents = [run.values.get(fingerprint, "") for run in runs]
        if "" in contents or not any(contents):  # not recorded in all runs: the path has to do
            telling |= {key: None for key in readable[:1] if len({run.values.get(key) for run in runs}) > 1}
            continue
        if len(set(contents)) == 1:
            continue
        if name == "data":  # the order of the tasks counts as well
            contents = [f"{run.values[fingerprint]} {run.values.get('task')}" for run in runs]
        kinds = len(set(contents))
        # A key follows the contents where each content has one value of it: as many pairs as contents. It
        # says the same where each value has one content, too: also as many values.
        following, exact = [], []
        for key in readable:
            values = [run.values.get(key) for run in runs]
            if len(set(values)) > 1 and len(set(zip(contents, values, strict=True))) == kinds:
                following.append(key)
                if len(set(values)) == kinds:
                    exact.append(key)
        telling |= dict.fromkeys((exact or following)[:1])
        if not exact:
            telling[fingerprint] = None
    tasks_by_values: dict[tuple[str | None, ...], set[str | None]] = {}
    for run in runs:
        values_of_run = tuple(run.values.get(key) for key in telling)
        tasks_by_values.setdefault(values_of_run, set()).add(run.values.get("task"))
    if any(len(tasks) > 1 for tasks in tasks_by_values.values()):
        telling["task"] = None
    return list(telling)


def differing(runs: Sequence[Run]) -> list[str]:
    """Returns the keys whose values differ: contents first, then options of groups, then single values.

    A key whose value follows from the option of its group is left out: `optimizer=adamw8bit` says it.
    """
    contents = differing_contents(runs)
    # What stands for contents was judged above.
    judged = {"task", "model.revision", *(key for keys in READABLE.values() for key in keys if "." in key)}
    keys = dict.fromkeys(key for run in runs for key in run.values if not key.endswith(FINGERPRINT))
    differ = [key for key in contents if key != "model"]  # the option of a group, which comes with the values
    differ += [key for key in keys if key not in judged and _differs(key, runs)]
    of_model = [key for key in differ if key.split(".")[0] == "model"]
    # The files of a model that is made in code follow from its settings.
    for name in ("base model", "tokenizer", "code"):
        fingerprint = f"{name}{FINGERPRINT}"
        pairs = {(run.values.get(fingerprint), *(run.values.get(key) for key in of_model)) for run in runs}
        if len(pairs) == len({pair[1:] for pair in pairs}):
            differ = [key for key in differ if key != fingerprint]
    return sorted(differ, key=lambda key: (0,) if key in contents else (1, "." in key, key in EXTENDABLE))


def _differs(key: str, runs: Sequence[Run]) -> bool:
    """Whether runs have different values of a key, and not only because their options of its group differ."""
    group, nested = key.split(".")[0], "." in key
    by_option: dict[str, set[str]] = {}
    for run in runs:
        if key in run.values:
            by_option.setdefault(run.values.get(group, "") if nested else "", set()).add(run.values[key])
    grouped = nested and any(group in run.values for run in runs)
    if grouped and all(len(values) == 1 for values in by_option.values()):
        return False
    missing = not nested and any(key not in run.values for run in runs)
    return missing or len(set().union(*by_option.values())) > 1


def shorten_paths(runs: Sequence[Run]) -> None:
    """Rewrites data.paths of all runs as [x,y], relative to the folder that holds all of them."""
    lists: list[list[str]] = []
    for run in runs:
        try:
            lists.append([str(path) for path in json.loads(run.values.get("data.paths", "[]"))])
        except (ValueError, TypeError):  # cut by a tracker
            return
    folders = [os.path.dirname(path) for paths in lists for path in paths if os.path.isabs(path)]
    root = os.path.commonpath(folders) if folders else ""
    for run, paths in zip(runs, lists, strict=True):
        if paths:
            short = [os.path.relpath(path, root) if os.path.isabs(path) else path for path in paths]
            run.values["data.paths"] = f"[{','.join(short)}]"
