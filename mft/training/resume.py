"""Which checkpoint a run is resumed from: the newest with undamaged files, or the requested one.

Weights-only checkpoints are passed over.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from contextlib import nullcontext
from io import BytesIO
from pathlib import Path

from mft.distributed.engine import Engine, read_state
from mft.errors import UserError
from mft.files.checksums import COMPLETE, damage, digest
from mft.files.json_file import read_json
from mft.run_folder import metric_rows
from mft.training.checkpoint import RECORD, marked_steps
from mft.training.state import State
from mft.training.weights_only import is_weights_only


def newest_sound(
    run_dir: Path, engine: Engine | None = None, weights: bool = False
) -> tuple[Path | None, dict[str, str]]:
    """Returns the newest undamaged checkpoint of a run, or None, and what is wrong with the newer ones.

    engine: its ranks divide the reading and agree; all of them call it. None: this process is alone. weights:
    whether a weights-only one will do.
    """
    steps = marked_steps(run_dir / "checkpoints") if weights else resumable_steps(run_dir)
    damaged: dict[str, str] = {}
    # the ranks may see a shared disk at different ages: they take the list of the first one
    for step in reversed(engine.gather(steps)[0] if engine else steps):
        folder = run_dir / "checkpoints" / f"step-{step}"
        problem = trouble_of_all(folder, engine) if engine else trouble(folder)
        if not problem:
            return folder, damaged
        damaged[folder.name] = problem
    return None, damaged


def resumable_steps(run_dir: Path) -> list[int]:
    """Returns the steps of the checkpoints that were written to their end and kept their state, ascending."""
    checkpoints = run_dir / "checkpoints"
    return [s for s in marked_steps(checkpoints) if not is_weights_only(checkpoints / f"step-{s}")]


def trouble_of_all(folder: Path, engine: Engine) -> str:
    """Returns `trouble`, the same on all ranks, which divide the reading; all of them call it."""
    with engine.patient():  # files are of very different sizes
        problems = engine.gather(trouble(folder, (engine.rank, engine.world)))
    return next(filter(None, problems), "")


def trouble(folder: Path, part: tuple[int, int] = (0, 1)) -> str:
    """Returns what is wrong with a checkpoint, "" if nothing is. part: see `checksums.damage`."""
    problem = damage(folder, COMPLETE, part)
    if problem or is_weights_only(folder):
        return problem
    try:  # nothing but this tells of a damaged one that was written without checksums
        read_state(folder / "state")
        values = json.loads((folder / "state" / "loop.json").read_text(encoding="utf-8"))
        if (step := State.from_dict(values).step) != int(folder.name.removeprefix("step-")):
            return f"state/loop.json is of step {step}"
        return "" if (folder / "state" / "loss.pt").is_file() else "state/loss.pt is missing"
    except UserError as error:
        return str(error)
    except (OSError, ValueError, RecursionError) as error:
        return f"state/loop.json is damaged: {error}"


def set_aside(folder: Path, why: str) -> Path:
    """Renames a checkpoint so that it no longer counts; returns the folder. why: how its name begins."""
    new, number = folder.with_name(f"{why}-{folder.name}"), 1
    while new.exists():
        number += 1
        new = folder.with_name(f"{why}-{folder.name}-{number}")
    folder.rename(new)
    return new


def none_sound(run_dir: Path, damaged: Mapping[str, str]) -> UserError:
    """Returns the error of a run without a sound checkpoint that will do. damaged: what is wrong with each;
    those that are not among them hold the weights alone."""
    checkpoints = run_dir / "checkpoints"
    names = [f"step-{step}" for step in reversed(marked_steps(checkpoints))]
    weights_only = [name for name in names if name not in damaged]
    problems = [f"{name}: {problem}" for name, problem in damaged.items()]
    problems += [f"{name}: holds the weights alone" for name in weights_only]
    resumable = " and has the state that a resume needs" if weights_only else ""
    instead = _from_its_weights(checkpoints / weights_only[0]) if weights_only else ""
    return UserError(
        f"No checkpoint in {checkpoints} is sound{resumable}: {'; '.join(problems)}. Copy the damaged ones "
        f"again, or start anew: with another output_dir, or after removing these checkpoints.{instead}"
    )


def _from_its_weights(folder: Path) -> str:
    """Returns " KEY=FOLDER starts a new run from its weights.", "" for a checkpoint without a model."""
    files = {"adapter_config.json": "peft.path", "config.json": "model.path"}
    key = next((key for name, key in files.items() if (folder / name).exists()), "")
    return f" {key}={folder} starts a new run from its weights." if key else ""


def rewind(run_dir: Path, step: int) -> str:
    """Makes the checkpoint of a step the newest one of its run; returns a sentence that says what was done.

    Newer ones are set aside. Raises UserError when it is missing or damaged.
    """
    checkpoints = run_dir / "checkpoints"
    steps, folder = marked_steps(checkpoints), checkpoints / f"step-{step}"
    resumable = resumable_steps(run_dir)
    if step not in resumable:
        problem = "does not exist or is incomplete"
        if step in steps:
            problem = "holds the weights alone (train.save_state=last), so it cannot be resumed"
        allowed = ", ".join(f"step-{other}" for other in resumable) or "none"
        instead = _from_its_weights(folder) if step in steps else ""
        raise UserError(f"train.resume={folder} {problem}. Allowed: {allowed}.{instead}")
    if problem := trouble(folder):
        mend = f"Choose another step, or train.resume={run_dir}."
        raise UserError(f"train.resume={folder} is damaged: {problem}. {mend}")
    newer = [set_aside(checkpoints / f"step-{other}", "newer").name for other in steps if other > step]
    (run_dir / "summary.json").unlink(missing_ok=True)  # the run is no longer finished
    sentence = f"resuming from step-{step}: metrics.jsonl is cut back to it, final/ is written anew"
    if newer:
        listed = ", ".join(f"checkpoints/{name}" for name in newer)
        sentence += f"; set aside, and yours to remove: {listed}"
    return sentence


def lost_rows(checkpoint: Path, state: State) -> str:
    """Returns what has become of the rows that metrics.jsonl held when a checkpoint was written.

    "" where they are as they were. state: of the checkpoint. Training cannot make these rows again: a person
    has to know of a gap.
    """
    path = checkpoint.parents[1] / "metrics.jsonl"
    recorded = read_json(checkpoint / "state" / RECORD)  # {} in one of an earlier version
    size = int(recorded.number("bytes") or 0)
    if size and path.exists() and digest(path, size) == recorded.text("xxh3"):
        return ""
    rows, end = metric_rows(path)
    with path.open("rb") if path.exists() else nullcontext(BytesIO()) as file:
        unreadable = file.read(end).count(b"\n") - len(rows)
    since = sum(state.meter[0][name] for name in ("steps", "skipped")) if state.meter else 0
    last = max(state.step - since, state.best.last_step)
    lost = [f"{unreadable} of them cannot be read"] if unreadable else []
    if last > 0 and last not in (row["step"] for row in rows):
        lost.append(f"there is none of step {last}")
    if lost:
        return f"{path} has lost rows: {', and '.join(lost)}. The others are kept"
    if not size:
        return ""
    return f"{path} has changed since {checkpoint.name} was written: do not trust its rows up to there"
