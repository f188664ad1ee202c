"""How soon the jobs of a sweep reach their first step, against a cold start of the same job.

    python -m benchmarks.startup [rounds]

A cold start is `mft train` in a fresh process, which imports everything. A sweep of four jobs follows in each
round; its first job is cold, too, the other three come from its fork server. Time is wall clock until the
first step is logged: of a cold start from the command on, of a later job from the moment its run folder
appears. Tiny model, tokens cached.
"""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

JOBS = 4
COMMON = [
    "debug=fast",
    "train.eval_at_start=false",
    "train.eval_every=null",
    "train.save_every=null",
    "tracking=[]",
    "launch.nproc=1",
    "peft=lora",
]


def rows(folder: Path) -> Path:
    """Makes a task of 64 short conversations."""
    folder.mkdir()
    turns = [{"role": "human", "content": "what comes next?"}, {"role": "bot", "content": "this and that"}]
    (folder / "rows.jsonl").write_text(f"{json.dumps({'chat_rounds': turns})}\n" * 64)
    return folder


def first_steps(command: list[str], under: Path, expected: int) -> list[tuple[float, float]]:
    """Runs a command; returns for each run folder under `under`, in order, when it appeared and its first
    step came."""
    process = subprocess.Popen(
        [sys.executable, "-m", "mft.cli", "train", *command], stdout=subprocess.DEVNULL
    )
    appeared: dict[Path, float] = {}
    stepped: dict[Path, float] = {}
    while process.poll() is None:
        for log in under.glob("**/log"):
            appeared.setdefault(log.parent, time.perf_counter())
        for run in appeared.keys() - stepped.keys():
            path = run / "metrics.jsonl"
            if path.exists() and "train/loss" in path.read_text():
                stepped[run] = time.perf_counter()
        time.sleep(0.01)
    if process.returncode or len(stepped) != expected:
        raise SystemExit(f"the command failed: mft train {' '.join(command)}")
    return [(appeared[run], stepped[run]) for run in sorted(appeared, key=lambda run: appeared[run])]


def main(rounds: int) -> None:
    """Prints both times and their ratio."""
    cold, later = [], []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        given = [*COMMON, f"data.paths=[{rows(folder / 'task')}]", f"cache_dir={folder / 'cache'}"]
        for number in range(rounds + 1):
            out = folder / f"round{number}"
            started = time.perf_counter()
            ((_, stepped),) = first_steps([*given, f"output_dir={out / 'cold'}"], out, 1)
            if number == 0:  # fills the caches of the disk and of tokens
                continue
            cold.append(stepped - started)
            seeds = ",".join(str(seed) for seed in range(JOBS))
            swept = first_steps(
                ["-m", *given, f"train.seed={seeds}", f"hydra.sweep.dir={out / 'sweep'}"], out / "sweep", JOBS
            )
            later += [stepped - appeared for appeared, stepped in swept[1:]]
    one, other = statistics.median(cold), statistics.median(later)
    print(f"cold start     {one:6.2f} s until the first step (median of {len(cold)})")
    print(f"later jobs     {other:6.2f} s (median of {len(later)})")
    print(f"ratio          {one / other:6.1f}")


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 3)
