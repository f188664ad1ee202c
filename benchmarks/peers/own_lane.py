"""The lanes of this project's environment: its own run, and matrix products of one thread as the peak.

    python -m benchmarks.peers.own_lane (run FOLDER ROOT | products) [OVERRIDES …]

ROOT: of the sources that are measured, another checkout perhaps; FOLDER: of the run, which must not exist.
"""

from __future__ import annotations

import gc
import json
import sys
from pathlib import Path

from benchmarks.peers.turns import Turns
from benchmarks.peers.work import checked_job

PRODUCTS, SIZE = 12, 2048
"""Products of square matrices in a turn, about a second, and their size: what oneDNN is fastest with here."""


def run(folder: Path, overrides: list[str]) -> None:
    """Trains as `mft train` does, in this process; a turn lasts from one step's counting of its rows to the
    next one's."""
    from mft.run import run as run_job

    turns = Turns()
    job = checked_job(overrides)
    folder.mkdir()
    gc.freeze()  # as a worker of `mft train` does

    def stop() -> bool:
        if not turns.begun:
            modules = json.loads((folder / "report" / "trained.json").read_text())["modules"]
            turns.step_done(trained=sum(module["trainable"] for module in modules.values()))
            return False
        row = json.loads((folder / "metrics.jsonl").read_text().splitlines()[-1])
        tokens = round(row["speed/tokens_per_second"] * row["speed/seconds_per_step"])
        with_loss = sum(value for name, value in row.items() if name.startswith("train/tokens/"))
        turns.step_done(loss=row["train/loss"], tokens=tokens, with_loss=int(with_loss))
        return False

    run_job(job.cfg, folder, stop)


def products() -> None:
    """Multiplies bf16 matrices; reports FLOPs of a turn."""
    import torch

    torch.set_num_threads(1)
    turns = Turns()
    one, other = torch.randn(2, SIZE, SIZE).bfloat16()
    turns.step_done()
    while True:
        for _ in range(PRODUCTS):
            one @ other
        turns.step_done(flops=PRODUCTS * 2 * SIZE**3)


if __name__ == "__main__":
    kind, *arguments = sys.argv[1:]
    if kind == "products":
        products()
    else:
        into, root, *given = arguments
        sys.path.insert(0, root)
        run(Path(into), given)
