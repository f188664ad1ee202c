"""Rows that cut samples: no token is lost, as input or as target, and each keeps its task and its
isolation."""

from collections import Counter
from itertools import islice

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mft.batch import IGNORE, Row, Sample, Span, StepCounts
from mft.data.cache.store import Samples
from mft.data.packing import Concat, Pack
from mft.data.sampler import Sampler, eval_batches, spread
from mft.model.tiny import Tiny
from mft.model.token_loss import TokenLoss

LONG = [{"text": f"{i} " + "word " * (7 * i % 90)} for i in range(60)]
OTHER = [{"text": f"def f{i}(): pass"} for i in range(20)]


@pytest.fixture
def samples(make_store):
    settings = {"split": [1, 0, 0], "seq_length": 32, "long_samples": "keep"}
    return Samples([make_store(LONG, "long", **settings), make_store(OTHER, "other", **settings)])


def epoch_of(samples, epoch=0, **change) -> list[list[Row]]:
    sampler = Sampler(samples, Concat(), 32, 8, seed=1, **change)
    return [rows for rows, _ in islice(sampler.steps(epoch), sampler.steps_in_epoch(epoch))]


@given(st.lists(st.integers(1, 200), max_size=60), st.integers(2, 64))
def test_rows_are_the_samples_end_to_end_cut(lengths, seq_length):
    rows = Concat().rows(lengths, seq_length)
    flat = [(span.sample, at) for row in rows for span in row for at in range(span.start, span.stop)]
    assert flat == [(i, at) for i, length in enumerate(lengths) for at in range(length)]
    widths = [sum(span.stop - span.start for span in row) for row in rows]
    assert all(width == seq_length for width in widths[:-1]) and all(
        0 < width <= seq_length for width in widths[-1:]
    )


def test_long_samples_are_kept_whole(samples):
    report = samples.stores[0].report
    assert report["kept"] == 60 and report["truncated"] == 0 and samples.lengths_N.max() > 90


@pytest.mark.parametrize("window", [4096, 20])
def test_no_token_is_lost_and_each_keeps_its_task(samples, window):
    expected, inputs = Counter(), Counter()
    for i in range(len(samples)):
        sample = samples.sample(i)
        expected += Counter((sample.task, int(t)) for t in sample.ids_S[1:][sample.trained_S[1:]])
        inputs += Counter((sample.task, int(t)) for t in sample.ids_S)
    found, seen, counted = Counter(), Counter(), np.zeros(2)
    for rows in epoch_of(samples, window=window):
        batch = Concat().collate(samples.load(rows), 0, 32)
        pairs = zip(batch.task_BT.flatten().tolist(), batch.target_BT.flatten().tolist(), strict=True)
        found += Counter(pair for pair in pairs if pair[1] != IGNORE)
        filled = batch.sample_BT >= 0
        seen += Counter(zip(batch.task_BT[filled].tolist(), batch.ids_BT[filled].tolist(), strict=True))
        counted += StepCounts.of([batch], 2).tokens_K.numpy()
    assert found == expected and seen == inputs
    assert counted.tolist() == samples.totals()[1].tolist()


def test_a_row_predicts_the_first_token_of_the_next_exactly():
    ids_S, trained_S = np.arange(10, 17, dtype=np.int32), np.ones(7, bool)
    spans = [Sample(ids_S[:4], trained_S[:4], 0, 5, 14), Sample(ids_S[4:], trained_S[4:], 0, 5)]
    batch = Concat().collate([[spans[0]], [spans[1]]], 0, 4)
    assert batch.target_BT.tolist() == [[11, 12, 13, 14], [15, 16, IGNORE, IGNORE]]
    assert batch.sample_BT.tolist() == [[0] * 4, [1, 1, 1, -1]]
    assert batch.position_BT.tolist() == [[0, 1, 2, 3], [0, 1, 2, 0]]


def test_samples_that_fit_are_packed_samples(samples):
    short = [60, 61, 62]
    length = int(samples.lengths_N[short].sum())
    whole = samples.load([[Span(i, 0, int(samples.lengths_N[i])) for i in short]])
    one, other = (
        b.collate(rows, 0, length) for b, rows in ((Concat(), whole), (Pack(), samples.load([short])))
    )
    for name in ("ids_BT", "target_BT", "task_BT", "sample_BT", "position_BT"):
        assert getattr(one, name).tolist() == getattr(other, name).tolist()


def test_the_loss_of_a_row_is_that_of_its_parts_alone(samples, cache_dir):
    import torch

    family = Tiny(cache_dir=str(cache_dir), vocab_size=512)
    module = TokenLoss(family.model("float32"), family)
    rows = [row for rows in epoch_of(samples) for row in rows if len(row) > 1][:4]

    def loss(rows):
        batch = Concat().collate(samples.load(rows), 0, 32)
        with torch.no_grad():
            nll_BT, _ = module(batch)
        return nll_BT[batch.target_BT != IGNORE]

    alone = torch.cat([loss([[span]]) for row in rows for span in row])
    assert torch.allclose(loss(rows), alone, atol=1e-5) and len(alone) > 60


def test_order_follows_seed_and_epoch_and_is_resumed(samples):
    whole = list(islice(Sampler(samples, Concat(), 32, 8, seed=1).steps(), 12))
    rest = list(islice(Sampler(samples, Concat(), 32, 8, seed=1).steps(*whole[4][1]), 7))
    assert rest == whole[5:]
    assert epoch_of(samples, 0) != epoch_of(samples, 1)


def test_validation_reads_every_token_too(samples):
    ranks = [eval_batches(samples, spread(samples, 0), Concat(), 32, 4, rank, 2) for rank in range(2)]
    spans = [span for batches in ranks for rows in batches for row in rows for span in row]
    assert sum(span.stop - span.start for span in spans) == samples.lengths_N.sum()
