"""The tasks of a run folder as MLflow's data sets: one each, with what the run took of it."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import TYPE_CHECKING

from mft.console.credentials import hidden
from mft.files.json_file import Values, read_json
from mft.tracking.params import cut

if TYPE_CHECKING:
    from mlflow.entities import DatasetInput

REPORT = "report/data.json"
CONTEXTS = {"train": "training", "valid": "validation", "test": "testing"}
NAME_LIMIT = 200  # MLflow takes 500
SOURCE_LIMIT = 20_000  # characters; MLflow takes 65,535
DIGEST = 8, 4  # hex digits of the rows' fingerprint, and of the hash of what the run took of them


def dataset_inputs(run_dir: Path) -> dict[str, DatasetInput]:
    """Returns {task: its data set}; {} for a run folder without an account of its data.

    The digest begins with the fingerprint of the rows, and ends with a hash of the counts: a store keeps the
    first profile of a name and digest, and a run with another tokenizer or split would show wrong counts.
    """
    from mlflow.entities import Dataset, DatasetInput, InputTag

    accounts, found = read_json(run_dir / REPORT), {}
    fingerprints = read_json(run_dir / "identity.json").part("fingerprints")
    for task in accounts:
        account, sizes = accounts.part(task), accounts.part(task).part("sizes")
        profile = json.dumps(_profile(account))
        hashes = fingerprints.text(f"task.{task}"), hashlib.sha256(profile.encode()).hexdigest()
        digest = "-".join(value[:digits] for value, digits in zip(hashes, DIGEST, strict=True) if value)
        used = [context for split, context in CONTEXTS.items() if sizes.part(split).number("samples")]
        dataset = Dataset(dataset_name(task), digest, "local", _source(account), profile=profile)
        tags = [InputTag("mlflow.data.context", ", ".join(used))] if used else []
        found[task] = DatasetInput(dataset, tags)
    return found


def dataset_name(task: str) -> str:
    """Returns the name of a task's data set."""
    return cut(hidden(task), NAME_LIMIT)


def _profile(account: Values) -> dict[str, int | float]:
    """Returns counts by name, all on one level: MLflow's page shows a line for each."""
    profile = {key: account.number(key) for key in ("rows", "kept", "samples", "tokens", "trained_tokens")}
    profile |= {f"dropped_{why}": count or None for why, count in account.part("dropped").items()}
    for split in CONTEXTS:
        sizes = account.part("sizes").part(split)
        if sizes.number("samples"):
            profile |= {f"{split}_{count}": sizes.number(count) for count in sizes}
    return {name: value for name, value in profile.items() if value is not None}


def _source(account: Values) -> str:
    """Returns what MLflow's local source reads, the first path, and all paths beside it."""
    paths = [hidden(path) for path in account.texts("paths")] or [""]
    while len(source := json.dumps({"uri": paths[0], "paths": paths})) > SOURCE_LIMIT and len(paths) > 1:
        paths = paths[: len(paths) // 2]
    return cut(source, SOURCE_LIMIT)
