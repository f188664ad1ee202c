"""What a tracker keeps of a run beside its config."""

from __future__ import annotations

import json

from mft.assembly.start import Run
from mft.config import identity, repetition
from mft.files.json_file import read_json
from mft.run_folder import MICRO_BATCH
from mft.training import provenance


def run_tags(r: Run) -> dict[str, str]:
    """Returns what a tracker keeps beside the config: command, sweep, data, versions, host."""
    cfg, run_dir = r.cfg, r.folder
    record, recorded = read_json(run_dir / "overrides.json"), identity.identity_of(run_dir)
    overrides, plugins = record.texts("overrides"), record.texts("plugins")
    command = repetition.command(overrides, record.text("folder"), record.texts("search"), plugins)
    sizes = {task: counts["splits"] for task, counts in read_json(run_dir / "report" / "data.json").items()}
    tags = provenance.tags(r.engine.device.type, r.engine.world) | {
        "name": record.text("name"),
        "command": command,
        "overrides": " ".join(overrides),
        "data_sizes": json.dumps(sizes),
        "total_steps": str(int(read_json(run_dir / "plan.json").number("total_steps") or 0)),
        "identity": recorded.extended if recorded else "",
        "data_fingerprint": record.text("data"),
        "run_folder": str(run_dir),
    }
    if found := read_json(run_dir / MICRO_BATCH).number("per_device_batch_size"):
        tags["per_device_batch_size"] = str(int(found))  # the config says auto
    if recorded:
        tags["tasks"] = json.dumps(recorded.tasks)
        for name in recorded.fingerprints.keys() & set(identity.CONTENTS):
            tags[provenance.fingerprint_tag(name)] = recorded.fingerprints[name]
    tags |= {group: cfg.choices[group] for group in ("model", "peft", "dist", "loss") if group in cfg.choices}
    if record.text("sweep"):
        tags |= {"sweep": record.text("sweep"), "job": record.text("label") or tags["overrides"]}
    return tags
