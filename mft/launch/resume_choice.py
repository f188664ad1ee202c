"""Which folder a run starts or resumes in: a fresh one, the newest unfinished run of its identity, or a named
one."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mft.config import yaml_file
from mft.config.identity import VERSION, Identity, differences, identity_of
from mft.errors import UserError, nearest
from mft.run_folder import LOCK, MICRO_BATCH, RunStatus, is_locked, status
from mft.training.checkpoint import newest

BEFORE_A_RUN = (
    *("config.yaml", "identity.json", "overrides.json", "plan.json", MICRO_BATCH, "provenance.json"),
)
"""Files left by a run that was killed, or found its disk full, before its first step."""

PARTIAL = (LOCK, "log", *BEFORE_A_RUN, *(f"{name.rpartition('.')[0]}.tmp" for name in BEFORE_A_RUN))
"""All that such a run may leave, also files that were being written."""


def is_finished(run_dir: Path, identity: Identity, resume: str = "auto") -> bool:
    """Whether the folder holds the finished run of this length, and `resume` does not ask for an earlier
    step."""
    recorded = identity_of(run_dir)
    # extended: with the length, by which a longer run is not finished yet
    same = recorded is not None and recorded.extended == identity.extended
    return same and status(run_dir) is RunStatus.finished and step_of(resume)[1] is None


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

    output_dir: where a fresh run would go; dated: whether it is the default, named by the date, so that with
    resume=auto the newest unfinished run of this identity beside it is taken instead; config: of this run,
    nested, to name the differences to another. Raises UserError when the folder holds another run, or when
    `resume` names a folder that cannot be resumed.
    """
    config = config or {}
    if resume not in ("auto", "never"):
        return _named(resume, identity, config), True
    if not dated:
        return output_dir, _resumes_in(output_dir, resume, identity, config)
    for folder in sorted(output_dir.parent.glob("*"), reverse=True) if resume == "auto" else ():
        recorded = identity_of(folder)
        same = recorded is not None and recorded.base == identity.base  # of whichever length
        if same and status(folder) is not RunStatus.finished and not is_locked(folder):
            return folder, True
    number, folder = 1, output_dir
    while folder.exists():  # two runs started within one second
        number += 1
        folder = output_dir.with_name(f"{output_dir.name}-{number}")
    return folder, False


def _named(resume: str, identity: Identity, config: Mapping[str, Any]) -> Path:
    """Returns the run folder that train.resume names, or whose checkpoint it names."""
    folder, step = step_of(resume)
    recorded = identity_of(folder)
    if recorded is None:
        above = next((path for path in folder.parents if identity_of(path)), None)
        close = f"; did you mean {above}?" if above else nearest(resume, ("auto", "never")) or "."
        raise UserError(
            f"train.resume={resume} is not a run folder: its identity.json is missing or damaged. Allowed: "
            f"auto, never, a run folder, or RUN/checkpoints/step-N{close}"
        )
    if recorded.base == identity.base:
        return folder
    another = _another(folder, recorded, identity, config)
    if step is None or recorded.version != VERSION:
        raise UserError(f"train.resume={folder} {another}.")
    raise UserError(
        f"train.resume={resume}: the run in {folder} {another}. To start a new run from its weights, leave "
        f"train.resume out and set peft.path={resume} (an adapter) or model.path={resume} (a full model)."
    )


def _resumes_in(folder: Path, resume: str, identity: Identity, config: Mapping[str, Any]) -> bool:
    """Returns whether output_dir holds this run; UserError where it holds anything else, or resume=never."""
    recorded = identity_of(folder)
    if recorded is None:
        _require_not_begun(folder)
        return False
    if recorded.base != identity.base:
        another = _another(folder, recorded, identity, config)
        raise UserError(f"output_dir={folder} {another}; choose another folder, or remove it.")
    if resume == "never":
        mend = "choose another folder, or remove it"
        raise UserError(f"output_dir={folder} already holds this run and train.resume=never; {mend}.")
    return True


def _another(folder: Path, recorded: Identity, identity: Identity, config: Mapping[str, Any]) -> str:
    """Returns how the run in a folder differs from the one of `identity`, to follow the folder's name."""
    if recorded.version != VERSION:
        trained = folder / "final" if (folder / "final").is_dir() else newest(folder)
        key = "peft.path" if trained and (trained / "adapter_config.json").exists() else "model.path"
        more = f"; {key}={trained} trains its model further, as a new run" if trained else ""
        return (
            f"holds a run that another version of mft wrote {recorded.numbers()}, so it cannot be resumed; "
            f"mft show, compare, merge and generate still read it{more}"
        )
    contents, values = differences(recorded, identity, yaml_file.of_run(folder), config)
    differing = [f"on other inputs: {contents}"] if contents else []
    if values or not contents:
        differing.append(f"of another config: {values}")
    return f"holds a run {'; and '.join(differing)}"


def _require_not_begun(folder: Path) -> None:
    """Raises UserError for a folder without a run's identity that holds more than what a run writes first."""
    names = sorted(path.name for path in folder.iterdir()) if folder.is_dir() else []
    config = folder / "config.yaml"
    try:
        text = "\n" + config.read_text(encoding="utf-8")
    except (OSError, ValueError):
        text = ""
    frozen = all(f"\n{key}:" in text for key in ("output_dir", "train", "launch"))  # as a run writes it
    if frozen and {"checkpoints", "metrics.jsonl", "final"} & set(names):
        raise UserError(
            f"output_dir={folder} holds a run whose identity.json is missing or damaged, so it cannot be "
            "resumed. Choose another folder, with peft.path or model.path set to one of its checkpoints, or "
            "remove this folder."
        )
    foreign = [name for name in names if name not in PARTIAL]
    # a person's own config.yaml is not to be overwritten
    if not foreign and not frozen and config.exists() and config.stat().st_size:
        foreign = [config.name]
    if foreign:
        holds = f"is not empty and holds no run, but {foreign[0]}"
        raise UserError(f"output_dir={folder} {holds}; choose another folder.")
