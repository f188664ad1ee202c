"""The demo's training step: token losses only where a token carries loss, against full logits; attention by
the fastest kernel of the machine, against torch's sdpa sample by sample; norms, gated MLPs, and a linear layer
with its adapter as one function each, against the steps of transformers and peft.

    python -m benchmarks.step [repeats [seq_length]]

The variants take turns on the same packed rows of the demo's tasks (2 rows of 1,024 tokens, LoRA, the
machine's fast precision); time is CPU seconds of the process. Memory is the peak of a fresh process for each
variant, above what it held before its first step. Needs `mft demo`.
"""

from __future__ import annotations

import json
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

ROWS = 2


def setting(seq_length: int, *overrides: str) -> tuple[Callable[[str], None], int]:
    """Returns (a function that runs one step of a variant, the non-padding tokens of a step)."""
    import torch

    from mft.batch import StepCounts
    from mft.config.build import build
    from mft.config.compose import compose_resolved
    from mft.config.schema import resolve_precision
    from mft.data.cache.store import Samples, prepare
    from mft.data.packing import Pack
    from mft.data.sampler import Sampler
    from mft.data.settings import DataSettings
    from mft.data.task import all_tasks
    from mft.data.template_choice import named
    from mft.data.tokenize import Encoder
    from mft.distributed.ddp import Single
    from mft.loss.means import TaskTokenMean
    from mft.model.attention import FAST, SDPA
    from mft.model.introspect import base_of
    from mft.model.peft.full import compute_dtype
    from mft.model.token_loss import TokenLoss

    cfg = compose_resolved(["experiment=demo", *overrides])
    precision = resolve_precision("auto").value
    family, peft = build(cfg.model), build(cfg.peft)
    tokenizer = family.tokenizer()
    tasks = all_tasks({name: build(cfg.task[name]) for name in cfg.task}, [])
    encoder = Encoder(tokenizer, named("mft"))
    stores = [prepare(task, encoder, DataSettings(seq_length=seq_length), cfg.cache_dir) for task in tasks]
    samples = Samples(stores)
    rows, _ = next(Sampler(samples, Pack(), seq_length, ROWS, seed=1).steps())
    batch = Pack().collate(samples.load(rows), tokenizer.pad_token_id, seq_length)
    engine = Single().start(precision)
    model = peft.attach(family.model(peft.dtype(precision), compute_dtype=compute_dtype(precision)), family)
    module = TokenLoss(model, family)
    optimizer = torch.optim.AdamW([p for p in module.parameters() if p.requires_grad], fused=True)
    module, optimizer = engine.prepare(module, optimizer)
    loss = TaskTokenMean()
    loss.setup([task.name for task in tasks], [1.0] * len(tasks))
    counts = StepCounts.of([batch], len(tasks))

    def step(variant: str) -> None:
        base_of(model).set_attn_implementation(SDPA if variant == "sdpa by sample" else FAST)
        if variant != "full logits":
            nll_BT, _ = module(batch)
        else:
            inputs = {"input_ids": batch.ids_BT, "position_ids": batch.position_BT}
            logits = engine.run_as_forward(
                lambda: model(**inputs, attention_mask=None, use_cache=False).logits
            )
            flat = torch.nn.functional.cross_entropy(
                logits.float().flatten(0, 1), batch.target_BT.flatten(), ignore_index=-100, reduction="none"
            )
            nll_BT = flat.view(batch.ids_BT.shape)
        engine.backward(loss.share(nll_BT, batch, counts))
        engine.step(1.0)

    return step, int((batch.sample_BT >= 0).sum())


VARIANTS = {
    "where trained": (),
    "layers by steps": ("model.fused=false",),
    "adapters by peft": ("peft.fused=false",),
    "sdpa by sample": (),
    "full logits": (),
}
"""Name → config overrides of the model that the variant trains."""


def peak_gib() -> float:
    """Returns this process's own peak; getrusage would count what its parent held when it was forked."""
    status = Path("/proc/self/status").read_text()
    return int(status.split("VmHWM:")[1].split()[0]) / 2**20


def memory(variant: str, seq_length: int) -> None:
    """Prints the peak of two steps above what the process held before, in GiB."""
    step, _ = setting(seq_length, *VARIANTS[variant])
    before = int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize() / 2**30
    step(variant)
    step(variant)
    print(json.dumps(peak_gib() - before))


def main(repeats: int, seq_length: int) -> None:
    """Prints the table."""
    made = {overrides: setting(seq_length, *overrides) for overrides in set(VARIANTS.values())}
    tokens = made[()][1]
    seconds: dict[str, list[float]] = {variant: [] for variant in VARIANTS}
    walls: dict[str, list[float]] = {variant: [] for variant in VARIANTS}
    for round_number in range(repeats + 1):
        for variant in VARIANTS:
            started, wall = time.process_time(), time.perf_counter()
            made[VARIANTS[variant]][0](variant)
            if round_number:  # the first warms up
                seconds[variant].append(time.process_time() - started)
                walls[variant].append(time.perf_counter() - wall)
    print(f"{tokens} tokens a step, {repeats} steps each, taking turns")
    base = statistics.median(seconds["full logits"])
    peaks = {}
    for variant in VARIANTS:
        done = subprocess.run(
            [sys.executable, "-m", "benchmarks.step", "--memory", variant, str(seq_length)],
            capture_output=True,
            text=True,
            check=True,
        )
        peaks[variant] = float(done.stdout.strip().splitlines()[-1])
    for variant in VARIANTS:
        median, wall = statistics.median(seconds[variant]), statistics.median(walls[variant])
        print(
            f"{variant:<16} {tokens / median:6.0f} tokens per CPU second ({base / median:.2f} x)  "
            f"{tokens / wall:6.0f} tokens/s  step memory {peaks[variant]:.2f} GiB "
            f"({peaks[variant] / peaks['full logits']:.2f} x)"
        )


if __name__ == "__main__":
    if sys.argv[1:2] == ["--memory"]:
        memory(sys.argv[2], int(sys.argv[3]))
    else:
        repeats, seq_length = (*map(int, sys.argv[1:3]), *(5, 1024)[len(sys.argv[1:3]) :])
        main(repeats, seq_length)
