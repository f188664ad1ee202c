"""What a rank holds of parameters, gradients and optimizer on two ranks of every backend, against ddp.

    python -m benchmarks.sharding

A llama of 61 million parameters (234 MiB in fp32), two steps of AdamW on rows of 16 tokens, so that
activations weigh nothing; fp32 on the CPU with gloo; full and LoRA. Printed is the higher of the two ranks'
peaks, from before loading on, in MiB and as a ratio to ddp's in the same run; tests/distributed/memory.py
says what is counted. DeepSpeed's sizes are five million elements, a layer: those of conf/dist (up to a
billion) would keep such a model whole.
"""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any


def cases() -> dict[str, tuple[Any, Any]]:
    """Returns backend and peft mode of each cell by "peft backend"."""
    from mft.distributed.ddp import Ddp
    from mft.distributed.deepspeed import Zero2, Zero3
    from mft.distributed.fsdp import Fsdp
    from mft.model.peft.full import Full
    from mft.model.peft.lora import Lora

    small = {"reduce_bucket_size": 5_000_000}
    deep = {"sub_group_size": 5_000_000, "stage3_max_reuse_distance": 5_000_000}
    backends = {
        "ddp": Ddp(),
        "zero2": Zero2(**small, allgather_bucket_size=5_000_000),
        "zero3": Zero3(
            **small,
            prefetch_bucket_size=5_000_000,
            max_live_parameters=5_000_000,
            config={"zero_optimization": deep},
        ),
        "fsdp": Fsdp(reduce_every_micro_batch=True),
    }
    pefts = {"full": Full(), "lora": Lora()}
    return {f"{p} {b}": (backend, peft) for p, peft in pefts.items() for b, backend in backends.items()}


def measured() -> dict[str, float]:
    """Returns the peak of each cell, in MiB."""
    from mft.model.tiny import Tiny
    from tests.distributed.memory import big_folder, trainings
    from tests.distributed.ranks import run_ranks

    with tempfile.TemporaryDirectory() as name:
        tiny = str(Tiny(cache_dir=f"{name}/tiny").folder())
        ranks = run_ranks(2, trainings, cases(), tiny, str(big_folder(Path(name))))
    return {cell: max(rank[cell] for rank in ranks) for cell in ranks[0]}


def main() -> None:
    """Prints the table of docs/distribution.md."""
    peaks = measured()
    backends = list(dict.fromkeys(cell.split()[1] for cell in peaks))
    print("| peft | " + " | ".join(backends) + " |\n" + "|--" * (1 + len(backends)) + "|")
    for peft in dict.fromkeys(cell.split()[0] for cell in peaks):
        one = peaks[f"{peft} ddp"]
        cells = [f"{peaks[f'{peft} {b}']:,.0f} MiB ({peaks[f'{peft} {b}'] / one:.2f})" for b in backends]
        print(f"| {peft} | {' | '.join(cells)} |")


if __name__ == "__main__":
    main()
