"""A run read back from its folder."""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path

from mft import run_folder
from mft.config import repetition, yaml_file
from mft.config.identity import VERSION, identity_of
from mft.files.json_file import Values, read_json
from mft.runs.facts import facts
from mft.runs.results import Run, flat, with_contents
from mft.training import provenance

TEST = "test/loss/"
"""Begins the names of the test losses of tasks."""

SYSTEM = "system/"
"""Begins the names of metrics of the machine, whose steps are seconds."""


def read_run(folder: Path, metrics: Iterable[str] = ()) -> Run:
    """Returns the run of a folder; what is missing or damaged there is left out.

    metrics: those that will be asked for; of the machine (system/…) they are read only then.
    """
    record, summary = read_json(folder / "overrides.json"), read_json(folder / "summary.json")
    plan, sent = read_json(folder / "plan.json"), read_json(folder / "mlflow.json")
    identity = identity_of(folder)
    if identity is not None and identity.version == VERSION:
        contents = with_contents(identity.tasks, record.text("data"), identity.fingerprints)
    else:  # of another version of mft: its fingerprints may be of something else
        contents = with_contents(plan.texts("tasks"), record.text("data"), None)
    values = flat(yaml_file.of_run(folder)) | contents
    rows = run_folder.metric_rows(folder / "metrics.jsonl")[0]
    steps = max((row["step"] for row in rows), default=None)
    if any(metric.startswith(SYSTEM) for metric in metrics):
        rows += run_folder.metric_rows(folder / "system.jsonl")[0]
    # Earlier versions kept the tags for MLflow alone.
    tags = read_json(folder / provenance.NAME) or sent.part("tags")
    reports = read_json(folder / "report" / "data.json")
    sizes = {task: splits for task in reports if (splits := reports.part(task).part("splits"))}
    test = summary.part("test")
    return Run(
        name=record.text("name") or record.text("label") or folder.resolve().name,
        values=values,
        rows=rows,
        state=run_folder.state(folder),
        seconds=summary.number("seconds"),
        memory=summary.number("peak_memory_gib"),
        command=_command(record),
        where=os.path.relpath(folder),
        folder=folder,
        key=sent.text("key"),
        place=f"{folder.resolve()} {identity.extended if identity else ''}",
        tokens=summary.number("tokens"),
        flops=summary.number("flops"),
        test={
            name.removeprefix(TEST): loss
            for name in test
            if name.startswith(TEST) and (loss := test.number(name)) is not None
        },
        test_step=None if (step := test.number("step")) is None else int(step),
        facts=facts(
            {name: tags.text(name) for name in tags}, values, sizes, steps, plan.number("total_steps")
        ),
    )


def _command(record: Values) -> str:
    overrides, search = record.texts("overrides"), record.texts("search")
    if not record:
        return ""
    return repetition.command(overrides, record.text("folder"), search, record.texts("plugins"))
