"""What a rank's tensors hold at the peak of a training step, predicted and measured, by part.

    python -m benchmarks.memory [WORD ...]

Cells whose names have all the words; none = all. tests/estimate/measured.py says what is measured: on the
CPU, in a process for each rank. Printed is, for each part, predicted / measured in MiB, of the rank that
holds most; what is offloaded is counted with the rest.
"""

from __future__ import annotations

import sys
import tempfile
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from mft.files.cache_folder import default_cache_dir

MIB = 2**20

CELLS = {
    "llama full single": "model=llama peft=full dist=single rows=2x256",
    "llama full single checkpointed bf16": "model=llama peft=full dist=single rows=2x256 ck=true precision=bf16",
    "llama full ddp every 2nd": "model=llama peft=full dist=ddp rows=2x256 ck=2",
    "llama full zero2": "model=llama peft=full dist=zero2 rows=2x256",
    "llama full zero2 checkpointed bf16": "model=llama peft=full dist=zero2 rows=2x256 ck=true precision=bf16",
    "llama full zero3 checkpointed": "model=llama peft=full dist=zero3 rows=2x256 ck=true",
    "llama full zero3 bf16": "model=llama peft=full dist=zero3 rows=2x256 precision=bf16",
    "llama full fsdp": "model=llama peft=full dist=fsdp rows=2x256",
    "llama full fsdp checkpointed bf16": "model=llama peft=full dist=fsdp rows=2x256 ck=true precision=bf16",
    "tied lora ddp packed": "model=tied peft=lora dist=ddp rows=2x256x4",
    "tied full single accumulating": "model=tied peft=full dist=single rows=4x128 accumulation=2",
    "qwen3 lora single bf16": "model=qwen3 peft=lora dist=single rows=2x256 precision=bf16",
    "qwen3 full zero2 checkpointed": "model=qwen3 peft=full dist=zero2 rows=4x256x2 ck=true",
    "qwen3 qlora zero3": "model=qwen3 peft=qlora dist=zero3 rows=2x256",
    "gpt_neox full fsdp": "model=gpt_neox peft=full dist=fsdp rows=2x256",
    "gpt_neox qlora single": "model=gpt_neox peft=qlora dist=single rows=2x256x2",
    "phi3 lora zero2 every 2nd": "model=phi3 peft=lora dist=zero2 rows=2x256 ck=2",
    "phi3 lora fsdp": "model=phi3 peft=lora dist=fsdp rows=2x256",
    "gemma2 lora zero3": "model=gemma2 peft=lora dist=zero3 rows=2x256",
    "gemma2 full ddp": "model=gemma2 peft=full dist=ddp rows=2x256",
    "mixtral full single": "model=mixtral peft=full dist=single rows=2x256",
    "mixtral lora fsdp": "model=mixtral peft=lora dist=fsdp rows=2x256",
    "demo lora single packed bf16": "model=demo peft=lora dist=single rows=2x512x4 precision=bf16",
    "demo full zero2 checkpointed bf16": "model=demo peft=full dist=zero2 rows=1x512 ck=true precision=bf16",
    "demo qlora fsdp": "model=demo peft=qlora dist=fsdp rows=2x256 precision=bf16",
    "demo full single checkpointed": "model=demo peft=full dist=single rows=1x512 ck=true",
    "llama full ddp accumulating": "model=llama peft=full dist=ddp rows=2x256 accumulation=2",
    "llama full zero2 accumulating": "model=llama peft=full dist=zero2 rows=2x256 accumulation=2",
    "llama full zero3 accumulating": "model=llama peft=full dist=zero3 rows=2x256 accumulation=2",
    "llama full fsdp accumulating": "model=llama peft=full dist=fsdp rows=2x256 accumulation=2",
    "llama full fsdp accumulating parts": "model=llama peft=full dist=fsdp rows=2x256 accumulation=2 "
    "dist.reduce_every_micro_batch=true",
    "llama full zero2 small buckets": "model=llama peft=full dist=zero2 rows=2x256 "
    "dist.reduce_bucket_size=1000000",
    "llama full single 8-bit AdamW": "model=llama peft=full dist=single rows=2x256 optimizer=adamw8bit",
    "olmo2 lora single unfused": "model=olmo2 peft=lora dist=single rows=2x256 model.fused=false "
    "peft.fused=false",
    "gemma lora single packed bf16": "model=gemma peft=lora dist=single rows=2x512x4 precision=bf16",
    "qwen2_moe qlora single": "model=qwen2_moe peft=qlora dist=single rows=2x256",
    "qwen3_moe full single checkpointed bf16": "model=qwen3_moe peft=full dist=single rows=2x256 ck=true "
    "precision=bf16",
    "mamba lora single": "model=mamba peft=lora dist=single rows=2x64",
    "mamba full single short": "model=mamba peft=full dist=single rows=1x64",
    "llama full single unfused": "model=llama peft=full dist=single rows=2x256 model.fused=false",
    "llama full single eager attention": "model=llama peft=full dist=single rows=2x256 model.attention=eager",
    "llama full single 8-bit AdamW bf16": "model=llama peft=full dist=single rows=8x64 optimizer=adamw8bit "
    "precision=bf16",
    "gemma2 full single long": "model=gemma2 peft=full dist=single rows=1x1024",
    "phi3 full single packed every 4th bf16": "model=phi3 peft=full dist=single rows=8x64x2 ck=4 precision=bf16",
    "mixtral lora single experts": "model=mixtral peft=lora dist=single rows=2x256 peft.experts=true",
    "mixtral full fsdp checkpointed bf16": "model=mixtral peft=full dist=fsdp rows=1x256 ck=true precision=bf16",
    "gemma2 full fsdp accumulating parts bf16": "model=gemma2 peft=full dist=fsdp rows=2x256 accumulation=3 "
    "precision=bf16 dist.reduce_every_micro_batch=true",
    "tied full zero3 every 2nd bf16": "model=tied peft=full dist=zero3 rows=8x64 ck=2 precision=bf16",
    "demo full single bf16": "model=demo peft=full dist=single rows=2x256 precision=bf16",
    "demo lora single long": "model=demo peft=lora dist=single rows=1x1024",
    "llama qlora single long bf16": "model=llama peft=qlora dist=single rows=1x1024 precision=bf16",
    "llama qlora single plain scales": "model=llama peft=qlora dist=single rows=2x256 peft.double_quant=false",
    "llama qlora zero2 bf16": "model=llama peft=qlora dist=zero2 rows=2x256 precision=bf16",
    "gpt_neox qlora single 8 bits bf16": "model=gpt_neox peft=qlora dist=single rows=2x256 peft.bits=8 "
    "precision=bf16",
    "llama qlora ddp every 2nd bf16": "model=llama peft=qlora dist=ddp rows=2x256 ck=2 precision=bf16",
    "llama lora single DoRA": "model=llama peft=lora dist=single rows=2x256 peft.use_dora=true",
    "llama lora single dropout": "model=llama peft=lora dist=single rows=2x256 peft.dropout=0.1",
    "tied lora single saved modules": "model=tied peft=lora dist=single rows=2x256 "
    "peft.modules_to_save=[embed_tokens,lm_head]",
    "starcoder2 full single short": "model=starcoder2 peft=full dist=single rows=1x64",
    "gpt_oss lora single": "model=gpt_oss peft=lora dist=single rows=2x256",
    "llama full fsdp kept whole": "model=llama peft=full dist=fsdp rows=2x256 dist.reshard=false",
    "llama full zero2 offloaded": "model=llama peft=full dist=zero2 rows=2x256 dist.offload_optimizer=true",
    "llama full zero3 offloaded bf16": "model=llama peft=full dist=zero3 rows=2x256 precision=bf16 "
    "dist.offload_optimizer=true dist.offload_parameters=true",
    "llama full zero3 small buckets": "model=llama peft=full dist=zero3 rows=2x256 "
    "dist.reduce_bucket_size=500000",
    "llama full zero3 of 4": "model=llama peft=full dist=zero3 rows=2x256 ranks=4",
    "llama full fsdp of 4": "model=llama peft=full dist=fsdp rows=2x256 ranks=4",
    "phi3 lora zero2 of 4 bf16": "model=phi3 peft=lora dist=zero2 rows=3x256 ranks=4 precision=bf16",
}
"""Name → model, peft, dist, rows (count x tokens x samples in each), ranks (of an engine, else 2), precision,
checkpointing, accumulation, optimizer, and other settings."""


def settings(cell: str, root: Path) -> tuple[list[str], Any, int]:
    """Returns the overrides of a cell, its micro-batch, and its number of ranks."""
    from mft.model.step_trace import Rows
    from tests.estimate.models import made

    values = dict(word.split("=", 1) for word in cell.split())
    rows = Rows(*map(int, values["rows"].split("x")))
    demo = values["model"] == "demo"
    given = [
        f"output_dir={root}/run",
        "model=demo" if demo else "model=auto",
        f"model.gradient_checkpointing={values.get('ck', 'false')}",
        f"peft={values['peft']}",
        f"dist={values['dist']}",
        f"data={'pack' if rows.samples > 1 else 'pad'}",
        f"data.paths=[{root}/rows.jsonl]",
        f"data.seq_length={rows.width}",
        f"train.per_device_batch_size={rows.count}",
        f"train.gradient_accumulation_steps={values.get('accumulation', '1')}",
        f"train.precision={values.get('precision', 'fp32')}",
        f"optimizer={values.get('optimizer', 'adamw')}",
    ]
    given += [f"{key}={value}" for key, value in values.items() if "." in key]
    given += [f"cache_dir={default_cache_dir()}"] if demo else [f"model.path={made(values['model'], root)}"]
    return given, rows, 1 if values["dist"] == "single" else int(values.get("ranks", 2))


def predicted(overrides: Sequence[str], rows: Any, world: int) -> Any:
    """Returns the estimate of a cell."""
    from mft.config.compose import compose_resolved
    from mft.estimate.rank import rank_memory

    return rank_memory(compose_resolved(list(overrides)), world, "cpu", rows=rows)


JOINED = {"frozen": "weights", "packed": "weights", "experts": "weights", "temporary": "activations"}
"""Part → the part that it is counted with, since tensors do not tell them apart."""


def joined(parts: dict[str, float]) -> dict[str, float]:
    """Returns parts under the names that both sides have."""
    found: dict[str, float] = {}
    for name, size in parts.items():
        found[JOINED.get(name, name)] = found.get(JOINED.get(name, name), 0.0) + size
    return found


def compared(cells: dict[str, str], root: Path) -> dict[str, tuple[dict[str, float], dict[str, float], Any]]:
    """Returns predicted and measured parts of each cell, and all that was measured on that rank."""
    from tests.distributed.ranks import run_ranks
    from tests.estimate.measured import all_measured

    given = {name: settings(cell, root) for name, cell in cells.items()}
    found = {}
    for world in sorted({ranks for _, _, ranks in given.values()}):
        of_world = {name: (overrides, rows) for name, (overrides, rows, n) in given.items() if n == world}
        ranks = run_ranks(world, all_measured, of_world)
        for name, (overrides, rows) in of_world.items():
            here = [rank[name] for rank in ranks]
            if broken := [rank["error"] for rank in here if "error" in rank]:
                raise RuntimeError(f"{name}: {broken[0]}")
            most = max(here, key=lambda rank: sum(rank["parts"].values()))
            one = predicted(overrides, rows, world)
            found[name] = (
                joined(Counter(one.parts) + Counter(one.host)),
                joined(most["parts"]),
                most | {"where": one.where, "notes": one.notes},
            )
    return {name: found[name] for name in cells}


def wrong(predicted: dict[str, float], measured: dict[str, float]) -> dict[str, float]:
    """Returns the relative errors that are too large: above 15 % in total, and of parts of more than 2 %."""
    total = sum(measured.values())
    pairs = {
        name: (predicted.get(name, 0.0), measured.get(name, 0.0)) for name in predicted.keys() | measured
    }
    pairs = {name: pair for name, pair in pairs.items() if max(pair) > 0.02 * total}
    pairs["total"] = (sum(predicted.values()), total)
    return {name: p / m - 1 if m else 9.9 for name, (p, m) in pairs.items() if abs(p - m) > 0.15 * m}


def main(words: Sequence[str]) -> None:
    """Prints a line for each cell."""
    cells = {name: cell for name, cell in CELLS.items() if all(word in name.split() for word in words)}
    with tempfile.TemporaryDirectory() as folder:
        results = compared(cells, Path(folder))
    for name, (one, other, more) in results.items():
        least = 0.02 * sum(other.values())
        parts = [part for part in one | other if max(one.get(part, 0), other.get(part, 0)) > least]
        sides = [(part, one.get(part, 0.0), other.get(part, 0.0)) for part in parts]
        sides = [("total", sum(one.values()), sum(other.values())), *sides]
        shown = ", ".join(f"{part} {a / MIB:.0f}/{b / MIB:.0f}" for part, a, b in sides)
        seen = ", ".join(f"{key} {more[key] / MIB:.0f}" for key in ("rise", "profiler", "rss"))
        faults = {part: f"{error:+.0%}" for part, error in wrong(one, other).items()}
        print(f"{name}: {shown} | {more['where']}, {seen} {more['notes'] or ''} {faults or 'ok'}", flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
