"""Which folder a run starts or resumes in: a fresh one, the newest unfinished one of its identity, or one
named."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mft.config import yaml_file
from mft.config.identity import VERSION, Identity, differences, identity_of
from mft.errors import UserError
from mft.run_folder import LOCK, is_locked, status
from mft.training.checkpoint import newest


def is_finished(run_dir: Path, identity: Identity, resume: str = "auto") -> bool:
    """Whether the folder holds the finished run of this length, and `resume` does not ask for an earlier
    step."""
    found = identity_of(run_dir)
    same = found is not None and found.extended == identity.extended
    return same and status(run_dir) == "finished" and step_of(resume)[1] is None


def step_of(resume: str) -> tuple[Path, int | None]:
    """Returns (RUN, N) of a train.resume that names RUN/checkpoints/step-N, (the folder it names, None) of
    another."""
    folder = Path(os.path.abspath(os.path.expanduser(resume)))
    number = folder.name.removeprefix("step-")
    if folder.parent.name == "checkpoints" and folder.name.startswith("step-") and number.isdigit():
        return folder.parent.parent, int(number)
    return folder, None


def choose(
    output_dir: Path, dated: bool, resume: str, identity: Identity, config: Mapping[str, Any] | None = None
) -> tuple[Path, bool]:
    """Returns (folder, whether its run is to be resumed).

    output_dir: where a fresh run would go; dated: whether that folder was made up from the date, so that with
    resume=auto the newest unfinished run of this identity beside it is taken instead; config: of this run,
    nested, to say in what another one differs. Raises UserError when the folder holds another run, or when
    `resume` names a folder that cannot be continued.
    """
    if resume not in ("auto", "never"):
        return _named(resume, identity, config or {}), True
    if not dated:
        return output_dir, _in_place(output_dir, resume, identity, config or {})
    if resume == "auto":
        for folder in sorted(output_dir.parent.glob("*"), reverse=True):
            found = identity_of(folder)
            if (
                found
                and found.base == identity.base
                and status(folder) != "finished"
                and not is_locked(folder)
            ):
                return folder, True
    number, folder = 1, output_dir
    while folder.exists():  # two runs started within one second
        number += 1
        folder = output_dir.with_name(f"{output_dir.name}-{number}")
    return folder, False


def _named(resume: str, identity: Identity, config: Mapping[str, Any]) -> Path:
    """Returns the run folder that train.resume names, or whose checkpoint it names."""
    folder, step = step_of(resume)
    found = identity_of(folder)
    if found is None:
        above = next((path for path in folder.parents if identity_of(path)), None)
        raise UserError(
            f"train.resume={resume} is not a run folder: it holds no identity.json, or a damaged one. "
            f"Allowed: auto, "
            f"never, a run folder, or RUN/checkpoints/step-N{f'; did you mean {above}?' if above else '.'}"
        )
    if found.base != identity.base and step is not None and found.version == VERSION:
        raise UserError(
            f"train.resume={resume}: the run in {folder} {_another(folder, found, identity, config)}. To "
            f"start a new run from its weights, leave train.resume out and set peft.path={resume} (an "
            f"adapter) or model.path={resume} (a full model)."
        )
    if found.base != identity.base:
        raise UserError(f"train.resume={folder} {_another(folder, found, identity, config)}.")
    return folder


def _in_place(folder: Path, resume: str, identity: Identity, config: Mapping[str, Any]) -> bool:
    found = identity_of(folder)
    if found is None:
        _check_not_begun(folder)
        return False
    if found.base != identity.base:
        another = _another(folder, found, identity, config)
        raise UserError(f"output_dir={folder} {another}; choose another folder, or remove it.")
    if resume == "never":
        raise UserError(
            f"output_dir={folder} already holds this run and train.resume=never; choose another folder, or "
            f"remove it."
        )
    return True


def _another(folder: Path, found: Identity, identity: Identity, config: Mapping[str, Any]) -> str:
    """Returns what is said of a folder whose run is not the one of `identity`: in what it differs."""
    if found.version != VERSION:
        trained = folder / "final" if (folder / "final").is_dir() else newest(folder)
        key = "peft.path" if trained and (trained / "adapter_config.json").exists() else "model.path"
        more = f"; {key}={trained} trains its model further, as a new run" if trained else ""
        return (
            f"holds a run that another version of mft wrote {found.numbers()}, so it cannot be resumed; "
            f"mft show, compare, merge and generate still read it{more}"
        )
    contents, values = differences(found, identity, _config(folder), config)
    if contents and values:
        return f"holds a run on other inputs: {contents}; and of another config: {values}"
    return (
        f"holds a run on other inputs: {contents}" if contents else f"holds a run of another config: {values}"
    )


def _config(folder: Path) -> dict[str, Any]:
    """Returns the config of a run folder as it was written; {} where it cannot be read."""
    try:
        found = yaml_file.load(folder / "config.yaml")
    except (OSError, UserError):
        return {}
    return found if isinstance(found, dict) else {}


BEFORE_A_RUN = ("config.yaml", "identity.json", "overrides.json", "plan.json")
"""Files that a run may have left which was killed, or found its disk full, before it had begun."""


def _check_not_begun(folder: Path) -> None:
    """Raises UserError for a folder without a run's identity that holds more than what a run writes first."""
    entries = list(folder.iterdir()) if folder.is_dir() else []
    if any(path.name in ("checkpoints", "metrics.jsonl", "final") for path in entries) and _frozen(folder):
        raise UserError(
            f"output_dir={folder} holds a run whose identity.json is missing or damaged, so it cannot be "
            "resumed. Choose another folder, with peft.path or model.path set to one of its checkpoints "
            "to start from their weights; or remove it."
        )
    left = {
        path.name
        for path in entries
        if path.suffix == ".tmp" and path.with_suffix(".json").name in BEFORE_A_RUN
    }
    left |= {
        path.name
        for path in entries
        if path.name in (LOCK, "config.tmp", *BEFORE_A_RUN) or path.name == "log"
    }
    foreign = sorted({path.name for path in entries} - left)
    config = folder / "config.yaml"
    if not foreign and config.exists() and config.stat().st_size and not _frozen(folder):
        foreign = [config.name]
    if foreign:
        raise UserError(
            f"output_dir={folder} is not empty and holds no run, but {foreign[0]}; choose another folder."
        )


def _frozen(folder: Path) -> bool:
    """Whether the config.yaml of a folder is one that a run wrote."""
    try:
        text = (folder / "config.yaml").read_text(encoding="utf-8")
    except (OSError, ValueError):
        return False
    return all(f"\n{key}:" in f"\n{text}" for key in ("output_dir", "train", "launch"))
