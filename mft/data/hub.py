"""Data sets of the Hugging Face hub, named `hf:owner/name[@revision][:split[:config]]`."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from mft.errors import UserError

PREFIX = "hf:"


def is_name(path: str | os.PathLike[str]) -> bool:
    """Whether a path of a task is the name of a data set."""
    return str(path).startswith(PREFIX)


def load(name: str) -> Any:
    """Returns the rows of a data set: an iterable of dicts that knows its `_fingerprint`.

    The split is `train` where none is named. What was loaded once is found in the cache of `datasets` offline.
    Raises UserError where the package is missing, or where neither hub nor cache has the data set.
    """
    where, _, rest = name.removeprefix(PREFIX).partition(":")
    path, _, revision = where.partition("@")
    split, _, config = rest.partition(":")
    try:
        import datasets
    except ModuleNotFoundError:
        raise UserError(f"{name}: data sets of the hub need the package datasets: pip install datasets") from None
    try:
        return datasets.load_dataset(path, config or None, split=split or "train", revision=revision or None)
    except Exception as error:  # the hub's client raises dozens of classes, from requests' to its own
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise UserError(
            f"{name}: the data set cannot be loaded ({reason}). Without a network, download it and give its folder of "
            "JSON lines or Parquet files"
        ) from error


def digest(name: str) -> str:
    """Returns the hash of a data set's content as `datasets` keeps it."""
    return f"hub:{load(name)._fingerprint}"


def task_name(name: str) -> str:
    """Returns what a task made of the data set is called: the last part of its name."""
    return Path(name.removeprefix(PREFIX).partition(":")[0].partition("@")[0]).name
