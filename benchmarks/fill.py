"""How much of a batch is tokens rather than padding: packing, padding grouped and not, on the demo's tasks.

    python -m benchmarks.fill

Fill = tokens / (rows x width), over the first epoch. Padding is to the longest sample of a micro-batch of 4;
`sequential` begins a new row where the next sample does not fit, as MFTCoder does. Needs `mft demo`; reads no
model.
"""

from __future__ import annotations

import time
from itertools import islice

import numpy as np

from mft.data.cache.store import Samples, prepare
from mft.data.packing import Pack, Pad, RowBuilder
from mft.data.sampler import Sampler, deal
from mft.data.settings import DataSettings

PER_DEVICE = 4


class Sequential(RowBuilder):
    """A new row where the next sample does not fit."""

    def rows(self, lengths: np.ndarray, seq_length: int) -> list[list[int]]:
        rows: list[list[int]] = []
        free = 0
        for i, length in enumerate(lengths.tolist()):
            if length > free:
                rows.append([])
                free = seq_length
            rows[-1].append(i)
            free -= length
        return rows


def demo_samples(seq_length: int) -> Samples:
    """Returns the training samples of the demo's tasks."""
    from mft.config.build import build
    from mft.config.compose import compose_resolved
    from mft.data.template_choice import named
    from mft.data.tokenize import Encoder

    cfg = compose_resolved(["experiment=demo"])
    encoder = Encoder(build(cfg.model).tokenizer(), named("mft"))
    settings = DataSettings(seq_length=seq_length)
    return Samples([prepare(build(cfg.task[name]), encoder, settings, cfg.cache_dir) for name in cfg.task])


def fill(
    samples: Samples,
    builder: RowBuilder,
    seq_length: int,
    accumulation: int = 1,
    longest: bool = False,
    sort: bool = False,
) -> float:
    """Returns tokens / (rows x width) of an epoch, without the empty rows that fill its last step.

    longest: a micro-batch is as wide as its longest row, else seq_length; sort: a step's rows are dealt by
    length.
    """
    sampler = Sampler(samples, builder, seq_length, PER_DEVICE * accumulation, seed=42)
    tokens = room = 0
    for rows, _ in islice(sampler.steps(), sampler.steps_in_epoch(0)):
        for micro in deal(rows, 0, 1, accumulation, samples.row_length if sort else None):
            lengths = [samples.row_length(row) for row in micro if row]
            tokens += sum(lengths)
            room += len(lengths) * (max(lengths, default=0) if longest else seq_length)
    return tokens / room


def main() -> None:
    """Prints a line for each way of filling rows."""
    plain, grouped = Pad(length_group=1), Pad(length_group=PER_DEVICE)
    ways = {
        "padding to seq_length": (plain, {}),
        "padding, 4 samples a step": (plain, {"longest": True}),
        "padding, 128 a step, sorted in the step": (
            plain,
            {"accumulation": 32, "longest": True, "sort": True},
        ),
        "padding, 4 a step, grouped (data=pad)": (grouped, {"longest": True, "sort": True}),
        "padding, 32 a step, grouped (data=pad)": (
            grouped,
            {"accumulation": 8, "longest": True, "sort": True},
        ),
        "packing, sequential": (Sequential(), {}),
        "packing, best fit (data=pack)": (Pack(), {}),
    }
    for seq_length in (1024, 4096):
        samples = demo_samples(seq_length)
        tokens, longest = int(samples.lengths_N.sum()), int(samples.lengths_N.max())
        print(
            f"seq_length {seq_length:,}: {len(samples):,} samples, {tokens:,} tokens, the longest has "
            f"{longest:,}"
        )
        for name, (builder, options) in ways.items():
            start = time.process_time()
            found = fill(samples, builder, seq_length, **options)
            print(f"  {name:<42} {found:7.2%}   {time.process_time() - start:5.2f} CPU s")


if __name__ == "__main__":
    main()
