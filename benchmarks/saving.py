"""Memory that a rank takes while it saves full fine-tuning, and the disk that train.save_state=last spares.

    python -m benchmarks.saving

A llama of 119 million parameters (453 MiB in fp32) after a step of AdamW, on a CPU with gloo; one process for
single, two for zero2 and fsdp. Printed is by how much the memory of the rank that takes most rises while it
writes its part of the resume state: all tensors at once, as `safetensors.torch.save_file` takes them from
copies, and one after the other, both in the same run; then the same of the exported model, which sharding
backends gather on rank 0. tests/distributed/memory.py says what is counted. The second table is of the bytes
in checkpoints/ of a LoRA and a full run with five checkpoints, with each value of train.save_state.
"""

from __future__ import annotations

import tempfile
from pathlib import Path

Found = dict[str, dict[str, float]]


def peaks(folder: Path) -> Found:
    """Returns what the rank that takes most has of each number, by backend."""
    from mft.distributed.ddp import Single
    from mft.distributed.deepspeed import Zero2
    from mft.distributed.fsdp import Fsdp
    from mft.model.tiny import Tiny
    from tests.distributed.memory import savings
    from tests.distributed.ranks import run_ranks

    widths = {"hidden_size": 768, "intermediate_size": 3072, "layers": 12, "vocab_size": 16384}
    first, big = (
        str(Tiny(cache_dir=f"{folder}/tiny").folder()),
        str(Tiny(cache_dir=f"{folder}/big", **widths).folder()),
    )
    buckets = {"reduce_bucket_size": 5_000_000, "allgather_bucket_size": 5_000_000}
    two = {"zero2": Zero2(**buckets), "fsdp": Fsdp()}
    ranks = run_ranks(2, savings, two, first, big, folder)
    found = run_ranks(1, savings, {"single": Single()}, first, big, folder)[0]
    for name in two:
        found[name] = {key: max(rank[name][key] for rank in ranks) for key in ranks[0][name]}
    return found


def disk(folder: Path) -> dict[str, dict[str, int]]:
    """Returns the bytes in checkpoints/ by peft mode and train.save_state."""
    from tests.tiny_runs import train

    wide = ("model.hidden_size=256", "model.intermediate_size=1024", "model.layers=4", "peft.rank=16")
    given = ("train.max_steps=5", "train.save_every=1", "train.eval_every=5", "train.keep=5")
    found: dict[str, dict[str, int]] = {}
    for peft in ("lora", "full"):
        model = wide if peft == "lora" else wide[:-1]
        for kept in ("all", "last"):
            choices = (f"peft={peft}", f"train.save_state={kept}")
            _, run = train(folder, folder / "cache", *choices, *model, *given, out=f"{peft}-{kept}")
            files = [path for path in (run / "checkpoints").rglob("*") if path.is_file()]
            found.setdefault(peft, {})[kept] = sum(path.stat().st_size for path in files)
    return found


def main() -> None:
    """Prints the tables of docs/distribution.md."""
    with tempfile.TemporaryDirectory() as name:
        saved, bytes_of = peaks(Path(name)), disk(Path(name))
    print("\n| dist | state of a rank | at once | one by one | ratio | exported model |\n" + "|--" * 6 + "|")
    for backend, found in saved.items():
        state, former, now, model = (found[key] for key in ("state", "at once", "save_state", "model"))
        ratio = f"{now / former:.3f}"
        print(
            f"| {backend} | {state:,.0f} MiB | {former:,.0f} MiB | {now:,.1f} MiB | {ratio} | {model:,.0f} MiB |"
        )
    print("\n| peft | save_state=all | save_state=last | ratio |\n" + "|--" * 4 + "|")
    for peft, size in bytes_of.items():
        every, last = size["all"] / 2**20, size["last"] / 2**20
        print(f"| {peft} | {every:,.1f} MiB | {last:,.1f} MiB | {last / every:.2f} |")


if __name__ == "__main__":
    main()
