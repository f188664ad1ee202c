"""A packed step with attention per sample against one block mask a row: CPU time and peak memory.

    python -m benchmarks.attention [layers]

LoRA on all linear layers of a llama shaped like SmolLM2-135M (random weights), two rows of 1,024 tokens,
sample lengths drawn like the demo's. The two variants take turns in one process with one compute thread;
memory is the growth of the peak resident size over a step, each variant in a process of its own.
"""

from __future__ import annotations

import statistics
import subprocess
import sys
import time
from pathlib import Path

ROWS, LENGTH, ROUNDS = 2, 1024, 4


def sample_lengths(seed: int) -> list[int]:
    """Sample lengths that fill one row: log-normal with the demo's median of 165 tokens and mean of about
    230."""
    import numpy

    random = numpy.random.default_rng(seed)
    lengths: list[int] = []
    while (left := LENGTH - sum(lengths)) > 0:
        lengths.append(min(left, max(8, int(random.lognormal(5.1, 0.8)))))
    return lengths


def make(layers: int):  # type: ignore[no-untyped-def]
    """Returns the module that is measured and a batch for it."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    from mft.batch import Batch
    from mft.model.causal_lm import CausalLM
    from mft.model.peft.lora import Lora
    from mft.model.token_loss import TokenLoss

    torch.manual_seed(0)
    torch.set_num_threads(1)
    sizes = {
        "hidden_size": 576,
        "intermediate_size": 1536,
        "num_attention_heads": 9,
        "num_key_value_heads": 3,
    }
    config = LlamaConfig(**sizes, num_hidden_layers=layers, vocab_size=49152, tie_word_embeddings=True)
    family = CausalLM("unused")
    model = Lora().attach(LlamaForCausalLM._from_config(config, attn_implementation="sdpa"), family)
    module = TokenLoss(model, family)
    lengths = [sample_lengths(seed) for seed in range(ROWS)]
    position_BT = torch.stack([torch.cat([torch.arange(n) for n in row]) for row in lengths])
    sample_BT = (position_BT == 0).flatten().cumsum(0).view(ROWS, LENGTH) - 1
    ids_BT = torch.randint(0, config.vocab_size, (ROWS, LENGTH))
    target_BT = ids_BT.roll(-1, 1).masked_fill(torch.rand(ROWS, LENGTH) > 0.45, -100)
    task_BT = torch.zeros_like(ids_BT)
    return module, Batch(ids_BT, target_BT, task_BT, sample_BT, position_BT), lengths


def step(module, batch, per_sample: bool) -> float:  # type: ignore[no-untyped-def]
    """Runs one forward and backward and returns its CPU seconds."""
    module.per_sample = module.one_row = per_sample
    start = time.process_time()
    module(batch)[0].sum().backward()
    return time.process_time() - start


def peak(reset: bool = False) -> float:
    """Returns the largest resident size of this process since the last reset (Linux), in MiB."""
    if reset:
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
    lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    return int(next(line for line in lines if line.startswith("VmHWM")).split()[1]) / 1024


def main() -> None:
    layers = int(sys.argv[1]) if len(sys.argv) > 1 else 30
    module, batch, lengths = make(layers)
    if len(sys.argv) > 2:  # the child that measures memory
        before = peak(reset=True)
        step(module, batch, sys.argv[2] == "per_sample")
        print(peak() - before)
        return
    for variant in (False, True):
        step(module, batch, variant)  # warm up
    times = {variant: [] for variant in (False, True)}
    for _ in range(ROUNDS):
        for variant, seconds in times.items():
            seconds.append(step(module, batch, variant))
    mask, own = (statistics.median(times[v]) for v in (False, True))
    memory = [
        float(subprocess.check_output([sys.executable, "-m", "benchmarks.attention", str(layers), name]))
        for name in ("mask", "per_sample")
    ]
    print(f"{layers} layers, rows of {[len(row) for row in lengths]} samples")
    print(f"CPU seconds of a step: block mask {mask:.2f}, per sample {own:.2f}: {mask / own:.2f} x the speed")
    print(
        f"MiB of a step: block mask {memory[0]:.0f}, per sample {memory[1]:.0f}: "
        f"{memory[1] / memory[0]:.2f} x"
    )


if __name__ == "__main__":
    main()
