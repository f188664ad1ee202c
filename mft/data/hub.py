"""Datasets on the Hugging Face hub, named `hf:owner/name[@revision][:split[:config]]`."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import TYPE_CHECKING

from mft.errors import UserError

if TYPE_CHECKING:
    from datasets import Dataset

PREFIX = "hf:"
EXPECTED = "hf:owner/name[@revision][:split[:config]]"
FORM = re.compile(r"hf:([^:@]+)(?:@([^:]+))?(?::([^:\[]*(?:\[[^\]]*\])?))?(?::([^:]+))?")
"""Name, revision, split (also a part of one, as `train[:1000]`), config."""


def is_name(path: str | os.PathLike[str]) -> bool:
    """Whether a path of a task is the name of a data set."""
    return str(path).startswith(PREFIX)


def load(name: str) -> Dataset:
    """Returns the rows of a data set.

    The split is `train` where none is named. What was loaded once is found in the cache of `datasets`
    offline. Raises UserError where the package is missing, where neither hub nor cache has the data set, and
    for a split or config that it has not.
    """
    path, revision, split, config = _parts(name)
    try:
        import datasets
    except ModuleNotFoundError:
        raise UserError(f"{name}: hub data sets need the package datasets: pip install 'mft[hub]'") from None
    try:
        return datasets.load_dataset(path, config, split=split or "train", revision=revision)
    except Exception as error:  # the hub's client raises dozens of classes, from requests' to its own
        reason = " ".join(str(error).split()).rstrip(".") or type(error).__name__
        advice = "Without a network, download it and give its folder of JSON lines or Parquet files"
        if isinstance(error, ValueError):  # what is wrong with split or config
            advice = f"The form is {EXPECTED}"
        raise UserError(f"{name}: the data set cannot be loaded ({reason[:300]}). {advice}") from error


def digest(name: str) -> str:
    """Returns the hash of a data set's content as `datasets` keeps it."""
    return f"hub:{load(name)._fingerprint}"  # private in datasets (as of 5.2), which keys its own cache by it


def task_name(name: str) -> str:
    """Returns what a task made of the data set is called: the last part of its name."""
    return Path(_parts(name)[0]).name


def _parts(name: str) -> tuple[str, str | None, str | None, str | None]:
    """Returns name, revision, split and config; raises UserError for another form."""
    match = FORM.fullmatch(name)
    if match is None:
        raise UserError(f"{name}: not a valid dataset name; expected {EXPECTED}")
    return match[1], match[2], match[3] or None, match[4]
