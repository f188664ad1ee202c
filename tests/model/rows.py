"""Micro-batches of random tokens for the tests of the model floor."""

from __future__ import annotations

import torch

from mft.batch import IGNORE, Batch


def batch(
    rows: list[list[int]], length: int, vocabulary: int, pad: int = 1, trained: float = 0.6, seed: int = 0
) -> Batch:
    """A batch whose rows hold samples of the given lengths, padded to `length`; `trained`: share with
    loss."""
    generator = torch.Generator().manual_seed(seed)
    shape = (len(rows), length)
    ids_BT = torch.full(shape, pad)
    target_BT, task_BT = torch.full(shape, IGNORE), torch.full(shape, -1)
    sample_BT, position_BT = torch.full(shape, -1), torch.zeros(shape, dtype=torch.long)
    number = 0
    for b, lengths in enumerate(rows):
        start = 0
        for n in lengths:
            part = slice(start, start + n)
            ids = torch.randint(2, vocabulary, (n,), generator=generator)
            target = torch.cat([ids[1:], torch.tensor([IGNORE])])
            target[torch.rand(n, generator=generator) > trained] = IGNORE
            ids_BT[b, part], target_BT[b, part] = ids, target
            task_BT[b, part], sample_BT[b, part], position_BT[b, part] = 0, number, torch.arange(n)
            start, number = start + n, number + 1
    return Batch(ids_BT, target_BT, task_BT, sample_BT, position_BT)


def inputs(batch: Batch) -> tuple[Batch]:
    """The arguments of TokenLoss.forward."""
    return (batch,)


def alone(batch: Batch) -> list[Batch]:
    """Each sample of a batch as a batch of its own, without padding."""
    found = []
    for n in range(int(batch.sample_BT.max()) + 1):
        b = int((batch.sample_BT == n).any(1).nonzero()[0])
        where = batch.sample_BT[b] == n
        cut = (
            t[b][where][None]
            for t in (batch.ids_BT, batch.target_BT, batch.task_BT, batch.sample_BT, batch.position_BT)
        )
        found.append(Batch(*cut))
    return found
