"""What tells the settings of runs apart: values of the config, options of groups, and the contents of what was read."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence

from mft.config.identity import EXTENDABLE
from mft.runs.results import FINGERPRINT, Run

TOLD_BY = {
    "data": ("data.paths", "task"),
    "base model": ("model.path", "model"),
    "tokenizer": ("model.path", "model"),
    "code": ("model.path", "model"),
    "adapter": ("peft.path",),
    "template": ("data.template",),
}
"""Contents that tell settings apart → keys that may say it in a readable way."""


def differing_contents(runs: Sequence[Run]) -> list[str]:
    """Returns the keys that tell apart runs on different tasks, data, base models, adapters or templates.

    The readable key is taken where it says exactly the same as the fingerprint. Where it says less (the files behind a
    path have changed), the fingerprint stands beside it. Paths to equal contents tell nothing apart.
    """
    found: dict[str, None] = {}
    for name, readable in TOLD_BY.items():
        fingerprint = f"{name}{FINGERPRINT}"
        contents = [run.values.get(fingerprint, "") for run in runs]
        if "" in contents and any(contents):  # some runs do not know theirs
            contents = [""] * len(runs)
        if not any(contents):
            found |= {key: None for key in readable[:1] if len({run.values.get(key) for run in runs}) > 1}
            continue
        if len(set(contents)) == 1:
            continue
        if name == "data":  # the order of the tasks counts as well
            contents = [f"{content} {run.values.get('task')}" for content, run in zip(contents, runs, strict=True)]
        apart = len(set(contents))
        kinds = {key: {run.values.get(key) for run in runs} for key in readable}
        pairs = {key: set(zip(contents, (run.values.get(key) for run in runs), strict=True)) for key in readable}
        telling = [key for key in readable if len(kinds[key]) > 1 and len(pairs[key]) == apart]  # never of equal ones
        exact = [key for key in telling if len(kinds[key]) == apart]
        found |= dict.fromkeys((exact or telling)[:1])
        if not exact:
            found[fingerprint] = None
    by_found: dict[tuple[str | None, ...], set[str | None]] = {}
    for run in runs:
        by_found.setdefault(tuple(run.values.get(key) for key in found), set()).add(run.values.get("task"))
    if any(len(tasks) > 1 for tasks in by_found.values()):
        found["task"] = None
    return list(found)


def differing(runs: Sequence[Run]) -> list[str]:
    """Returns the keys whose values differ, contents and options of groups first; not those that follow from a group's
    option."""
    apart = {"task", *(key for readable in TOLD_BY.values() for key in readable if "." in key), "model.revision"}
    keys = dict.fromkeys(
        key for run in runs for key in run.values if key not in apart and not key.endswith(FINGERPRINT)
    )
    contents = differing_contents(runs)
    found = [key for key in contents if key != "model"]  # which is a group's option and found below
    for key in keys:
        group = key.split(".")[0]
        by_option: dict[str, set[str]] = {}
        for run in runs:
            if key in run.values:
                by_option.setdefault(run.values.get(group, "") if "." in key else "", set()).add(run.values[key])
        follows = (
            "." in key and any(group in run.values for run in runs) and all(len(v) == 1 for v in by_option.values())
        )
        missing = "." not in key and any(key not in run.values for run in runs)
        if not follows and (missing or len(set().union(*by_option.values())) > 1):
            found.append(key)
    of_model = [key for key in found if key.split(".")[0] == "model"]
    for name in ("base model", "tokenizer", "code"):  # of a model that is made of its settings they follow from those
        pairs = {(run.values.get(f"{name}{FINGERPRINT}"), *(run.values.get(key) for key in of_model)) for run in runs}
        if len(pairs) == len({pair[1:] for pair in pairs}):
            found = [key for key in found if key != f"{name}{FINGERPRINT}"]
    return sorted(found, key=lambda key: (0,) if key in contents else (1, "." in key, key in EXTENDABLE))


def shorten_paths(runs: Sequence[Run]) -> None:
    """Rewrites data.paths of all runs as [x,y]: relative to the folder that holds all of them."""
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
