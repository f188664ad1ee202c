"""Kinds of faults: files of a run, its cache or its data that are damaged, lost or changed between two
commands."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

from benchmarks.faults import judge
from benchmarks.faults.case import Case, Failure, Refusal
from benchmarks.faults.setups import STEPS, write_tasks
from mft.files.checksums import COMPLETE, PROSE


def flipped(case: Case, path: Path) -> None:
    """One bit of the file is another."""
    content = bytearray(path.read_bytes())
    if content:
        content[case.draw.randrange(len(content))] ^= 1 << case.draw.randrange(8)
    path.write_bytes(content)


def truncated(case: Case, path: Path) -> None:
    """The end of the file is missing."""
    os.truncate(path, case.draw.randrange(max(1, path.stat().st_size)))


def emptied(case: Case, path: Path) -> None:
    """The file is there and empty."""
    path.write_bytes(b"")


def removed(case: Case, path: Path) -> None:
    """The file is gone."""
    path.unlink()


def garbled(case: Case, path: Path) -> None:
    """The file holds random bytes."""
    path.write_bytes(case.draw.randbytes(case.draw.randint(1, 4000)))


def other_json(case: Case, path: Path) -> None:
    """The file holds JSON, but not what belongs there."""
    path.write_text(
        case.draw.choice(["null", "[]", "{}", '"text"', "[[[]]]", '{"step": "x", "version": []}'])
    )


DAMAGES: dict[str, Callable[[Case, Path], None]] = {
    "one bit flipped": flipped,
    "truncated": truncated,
    "emptied": emptied,
    "removed": removed,
    "replaced by random bytes": garbled,
    "replaced by other JSON": other_json,
}


def damage(case: Case, path: Path, *names: str) -> str:
    """Damages a file in a random way, of those named or of all; returns which."""
    how = case.draw.choice(names or list(DAMAGES))
    before = path.read_bytes()
    DAMAGES[how](case, path)
    where = path.relative_to(case.work)
    case.strike(
        f"{where} {how}" if not path.exists() or path.read_bytes() != before else f"{where} unchanged"
    )
    return how


def killed(case: Case) -> None:
    """Gives the case a run that was killed after step 6 was saved."""
    case.bench.killed(case.setup, case.work)
    case.interrupted = True


def files(folder: Path) -> list[Path]:
    """Returns the files of a folder and below it."""
    return sorted(path for path in folder.rglob("*") if path.is_file())


def newest_checkpoint(case: Case) -> None:
    """Any file of the newest checkpoint: it is passed over, by its name, and the one before is taken."""
    killed(case)
    newest = _checkpoints(case)[-1]
    path = case.draw.choice(files(newest))
    before = path.read_bytes()
    damage(case, path)
    # without a marker it is one that was never finished; README.md is a person's to edit
    unnoticed = path.name in PROSE or (path.name == COMPLETE and not path.exists())
    if not unnoticed and (not path.exists() or path.read_bytes() != before):
        case.expects.append(rf"{newest.name} is damaged and passed over: \S*{path.name}")


def all_checkpoints(case: Case) -> None:
    """A file of every checkpoint: refused; as it says, the damaged ones are removed, and it starts anew."""
    killed(case)
    for folder in _checkpoints(case):
        sealed = [path for path in files(folder) if path.name not in (*PROSE, COMPLETE)]
        damage(case, case.draw.choice(sealed), "removed", "emptied", "replaced by random bytes")

    def remove(case: Case) -> None:
        for folder in _checkpoints(case):
            shutil.rmtree(folder)

    case.must_refuse = True
    case.refusals.append(Refusal("No checkpoint in .* is sound: .*after removing these", remove))


def checkpoints_gone(case: Case) -> None:
    """The checkpoints are gone altogether: the run begins anew in its folder."""
    killed(case)
    shutil.rmtree(case.run / "checkpoints")
    case.strike("checkpoints/ removed")


def metrics(case: Case) -> None:
    """metrics.jsonl: intact rows stay, and what is lost is told."""
    killed(case)
    path = case.run / "metrics.jsonl"
    before = path.read_bytes()
    damage(case, path)
    _may_lose_rows(case)
    # rows after the checkpoint are trained again, whatever became of them
    record = case.run / "checkpoints" / f"step-{STEPS - 2}" / "state" / "record.json"
    size = json.loads(record.read_text())["bytes"]
    if not path.exists() or path.read_bytes()[:size] != before[:size]:
        case.expects.append(r"metrics\.jsonl has (lost|changed)")


def torn_row(case: Case) -> None:
    """The last row of metrics.jsonl is half written, as a kill or a power cut leaves it."""
    killed(case)
    path = case.run / "metrics.jsonl"
    lines = path.read_bytes().splitlines(keepends=True)
    last = case.draw.choice([lines[-1], b'{"step": 7, "train/loss": 5.5}\n'])
    kept = lines[:-1] if last == lines[-1] else lines
    path.write_bytes(b"".join(kept) + last[: case.draw.randrange(1, len(last))])
    # the row of the validation of step 6 may be the torn one
    _may_lose_rows(case)
    case.strike("the last row of metrics.jsonl torn")


def identity(case: Case) -> None:
    """identity.json: refused; as it says, the folder is removed."""
    killed(case)
    damage(case, case.run / "identity.json")
    case.refusals.append(Refusal("identity.json is missing or damaged|holds a run", _remove_run))


def records(case: Case) -> None:
    """The other records of a run, which a resume writes anew or does not need."""
    killed(case)
    names = ["config.yaml", "overrides.json", "plan.json", "provenance.json", ".lock"]
    damage(case, case.draw.choice([case.run / name for name in names if (case.run / name).exists()]))


def summary(case: Case) -> None:
    """summary.json of a finished run: the run is finished once more from its last checkpoint."""
    case.bench.finished(case.setup, case.work)
    case.interrupted = True
    damage(case, case.run / "summary.json", "truncated", "emptied", "removed", "replaced by random bytes")


def final(case: Case) -> None:
    """final/ of a finished run: refused where it is used; the last checkpoint writes it anew."""
    case.bench.finished(case.setup, case.work)
    (weights,) = [path for path in files(case.run / "final") if path.suffix == ".safetensors"]
    damage(case, weights)
    code = case.end(case.start(["merge" if case.setup.peft == "lora" else "generate", "run", *_words(case)]))
    if code == 0:
        raise Failure("UNTOLD", "a damaged final/ was used")
    case.codes.clear()
    again = case.end(case.start([*case.given(), f"train.resume=run/checkpoints/step-{STEPS - 2}"]))
    case.strike(f"resumed from step {STEPS - 2} with exit code {again}")


def sample_losses(case: Case) -> None:
    """Losses of samples, which only comparisons read: the run goes on; damaged files stay what they are."""
    killed(case)
    path = case.draw.choice(files(case.run / "sample_losses"))
    damage(case, path)
    # a file of an earlier validation is not made again: put back what the damage took, to judge the rest
    reference = case.bench.reference(case.setup) / "sample_losses" / path.name
    case.end(case.start())
    if reference.exists():
        shutil.copy2(reference, path)


def report(case: Case) -> None:
    """Files of report/ and log/ are written anew."""
    killed(case)
    damage(case, case.draw.choice([*files(case.run / "report"), *files(case.run / "log")]))


def token_cache(case: Case) -> None:
    """A file of the cache: it is made anew, at once or by the same command."""
    killed(case)
    case.cache = shutil.copytree(case.bench.cache, case.work / "cache", copy_function=shutil.copy2)
    damage(case, case.draw.choice([path for path in files(case.cache) if "tiny" not in path.parts]))
    case.refusals.append(Refusal("The same command tokenises the task anew", lambda case: None))


def base_model(case: Case) -> None:
    """A file of the base model: refused, and resumed once it is as it was; never trained on another one."""
    killed(case)
    case.cache = shutil.copytree(case.bench.cache, case.work / "cache", copy_function=shutil.copy2)
    path = case.draw.choice([path for path in files(case.cache / "tiny") if path.suffix != ".lock"])
    damage(case, path)

    def restore(case: Case) -> None:
        shutil.copy2(case.bench.cache / path.relative_to(case.work / "cache"), path)

    # other inputs, or a sentence that names the file or its folder
    case.refusals.append(Refusal(f"on other inputs|{path.parent}", restore))


def data_changed(case: Case) -> None:
    """A row of the data has changed since: refused, and resumed once it is as it was."""
    case.tasks = case.work / "tasks"
    killed(case)
    write_tasks(case.tasks, rows=case.draw.choice([59, 61]))
    case.strike("rows of the data changed")

    def restore(case: Case) -> None:
        shutil.rmtree(case.work / "tasks")
        write_tasks(case.work / "tasks")

    case.must_refuse = True
    case.refusals.append(Refusal("on other inputs", restore))


def _checkpoints(case: Case) -> list[Path]:
    found = [path for path in (case.run / "checkpoints").glob("step-*") if (path / COMPLETE).exists()]
    return sorted(found, key=lambda path: int(path.name.removeprefix("step-")))


def _may_lose_rows(case: Case) -> None:
    """Notes that rows of metrics.jsonl were destroyed, and which were not."""
    case.losable = True
    expected = judge.rows(case.bench.reference(case.setup))
    case.intact = [row for row in judge.rows(case.run) if row in expected]


def _remove_run(case: Case) -> None:
    shutil.rmtree(case.run)


def _words(case: Case) -> list[str]:
    return ["--out", "merged"] if case.setup.peft == "lora" else ["a question"]
