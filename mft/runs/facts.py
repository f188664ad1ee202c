"""The facts of a run beside its config and its metrics: when, where and on what it ran."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from mft.training.provenance import fingerprint_tag

OF_TAGS = {
    "started": "started",
    "host": "host",
    "device": "device",
    "ranks": "ranks",
    "mft": "mft",
    "python": "python",
    "torch": "version.torch",
    "transformers": "version.transformers",
    "base model": fingerprint_tag("base model"),
    "data fingerprint": "data_fingerprint",
}
"""Fact → the tag that holds it."""

CHANGED = ("host", "device", "ranks", "mft", "git_commit")
"""Tags of which a change between the starts of a run is a fact."""

DIGITS = 12
"""Digits of a hash that a fact has."""


def facts(
    tags: Mapping[str, str],
    values: Mapping[str, str],
    sizes: Mapping[str, Any],
    steps: float | None,
    total: float | None,
) -> dict[str, Any]:
    """Returns {fact: text} of what was recorded; `data` is {task: {split: samples}}, all else is text.

    tags: as in provenance.json; values: `Run.values`; steps, total: those that were trained, and planned.
    """
    found: dict[str, Any] = {fact: tags[tag] for fact, tag in OF_TAGS.items() if tags.get(tag)}
    for name in ("base model", "data fingerprint"):
        if name in found:
            found[name] = found[name][:DIGITS]
    if commit := tags.get("git_commit"):
        dirty = " with uncommitted changes" if tags.get("git_dirty") == "true" else ""
        found["commit"] = f"{commit[:DIGITS]}{dirty}"
    for tag in CHANGED:
        if changed := tags.get(f"changed.{tag}"):
            found[f"changed {tag.removeprefix('git_')}"] = changed
    if model := values.get("model.path") or values.get("model"):
        found["model"] = model
    if steps is not None:
        found["steps"] = f"{steps:g} of {total:g}" if total else f"{steps:g}"
    if sizes:
        found["data"] = {task: dict(counts) for task, counts in sizes.items()}
    return found
