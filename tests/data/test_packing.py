from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from mft.batch import IGNORE, Sample, StepCounts
from mft.data.packing import Pack, Pad
from mft.data.settings import PadTo

A = Sample(np.array([10, 11, 12, 13], np.int32), np.array([False, False, True, True]), task=0, index=5)
B = Sample(np.array([20, 21], np.int32), np.array([False, True]), task=1, index=6)
C = Sample(np.array([30, 31, 32], np.int32), np.array([False, True, False]), task=0, index=7)
_ = IGNORE


def test_a_packed_batch_exactly():
    batch = Pack().collate([[A, B], [C], []], pad_id=99, seq_length=8)
    assert batch.ids_BT.tolist() == [[10, 11, 12, 13, 20, 21], [30, 31, 32, 99, 99, 99], [99] * 6]
    assert batch.target_BT.tolist() == [[_, 12, 13, _, 21, _], [31, _, _, _, _, _], [_] * 6]
    assert batch.task_BT.tolist() == [[0, 0, 0, 0, 1, 1], [0, 0, 0, -1, -1, -1], [-1] * 6]
    assert batch.sample_BT.tolist() == [[0, 0, 0, 0, 1, 1], [2, 2, 2, -1, -1, -1], [-1] * 6]
    assert batch.position_BT.tolist() == [[0, 1, 2, 3, 0, 1], [0, 1, 2, 0, 0, 0], [0] * 6]
    assert batch.samples == ((0, 5), (1, 6), (0, 7))
    assert str(batch.ids_BT.dtype) == "torch.int64"
    counts = StepCounts.of([batch], tasks=2)
    assert counts.tokens_K.tolist() == [3, 1] and counts.samples_K.tolist() == [2, 1]
    assert (counts.micro_batches, counts.processed) == (1, 9)


def test_the_layout_of_a_batch_exactly():
    batch = Pack().collate([[A, B], [C], []], pad_id=99, seq_length=8)
    layout = batch.layout
    assert (layout.tokens, layout.packed, layout.lengths) == (9, True, [4, 2, 3])
    assert layout.cu_seqlens.tolist() == [0, 4, 6, 9] and layout.cu_seqlens.dtype is torch.int32
    assert layout.row_m.tolist() == [0, 1, 2, 3, 4, 5, 6, 7, 8]
    assert layout.trained_n.tolist() == layout.trained_in_row_n.tolist() == [1, 2, 4, 6]
    assert layout.tokens_K.tolist() == [3, 1] and layout.samples_K.tolist() == [2, 1]

    layout = Pad().collate([[B], [], [A], [C]], pad_id=99, seq_length=8).layout
    assert (layout.packed, layout.lengths) == (False, [2, 4, 3])
    assert layout.row_m.tolist() == [0, 1, 8, 9, 10, 11, 12, 13, 14]
    assert layout.trained_n.tolist() == [0, 9, 10, 12] and layout.trained_in_row_n.tolist() == [0, 3, 4, 6]

    layout = Pad().collate([[], []], pad_id=99, seq_length=8).layout
    assert (layout.tokens, layout.lengths, layout.row_m.tolist()) == (0, [1], [0])
    assert layout.tokens_K.size == 0 and len(layout.trained_n) == 0


def test_a_layout_belongs_to_the_tensors_of_its_batch():
    batch = Pack().collate([[A, B]], pad_id=99, seq_length=8)
    assert batch.to("cpu").layout.lengths == [4, 2]
    moved = batch.to("meta")
    assert moved.ids_BT.is_meta and moved.layout.row_m.is_meta and moved.layout.lengths == [4, 2]
    assert not batch.layout.row_m.is_meta and not batch.ids_BT.is_meta
    one = replace(batch, position_BT=torch.arange(6)[None])
    assert one.layout.lengths == [6] and not one.layout.packed


@given(
    st.lists(
        st.lists(st.tuples(st.integers(1, 5), st.integers(0, 2), st.integers(0, 31)), max_size=3), min_size=1
    )
)
def test_counts_are_those_of_the_tokens(rows):
    """Against the pairs of task and sample that trained tokens have, one by one."""
    samples = [
        [Sample(np.ones(n, np.int32), (bits >> np.arange(n) & 1).astype(bool), task) for n, task, bits in row]
        for row in rows
    ]
    batch = Pack().collate(samples, pad_id=0, seq_length=16)
    cells = zip(
        *(t.flatten().tolist() for t in (batch.target_BT, batch.task_BT, batch.sample_BT)), strict=True
    )
    trained = [(task, sample) for target, task, sample in cells if target != IGNORE]
    counts = StepCounts.of([batch, batch], tasks=3)
    assert counts.tokens_K.tolist() == [2.0 * sum(task == k for task, _ in trained) for k in range(3)]
    assert counts.samples_K.tolist() == [2.0 * sum(task == k for task, _ in set(trained)) for k in range(3)]
    assert counts.micro_batches == 2 * bool(trained)
    assert counts.processed == 2 * int((batch.sample_BT >= 0).sum())


@pytest.mark.parametrize(
    ("pad_to", "width"), [(PadTo.longest, 4), ("longest", 4), (PadTo.seq_length, 8), ("seq_length", 8)]
)
def test_a_padded_batch_exactly(pad_to, width):
    batch = Pad(pad_to).collate([[A], [B]], pad_id=0, seq_length=8)
    rest = width - 4
    assert batch.ids_BT.tolist() == [[10, 11, 12, 13] + [0] * rest, [20, 21, 0, 0] + [0] * rest]
    assert batch.target_BT.tolist() == [[_, 12, 13, _] + [_] * rest, [21, _, _, _] + [_] * rest]
    assert batch.sample_BT.tolist() == [[0] * 4 + [-1] * rest, [1, 1, -1, -1] + [-1] * rest]


@pytest.mark.parametrize("builder", [Pad(), Pack(), Pad(PadTo.seq_length)])
def test_a_batch_without_samples_is_a_batch(builder):
    batch = builder.collate([[], []], pad_id=3, seq_length=8)
    width = 8 if builder == Pad(PadTo.seq_length) else 1
    assert batch.ids_BT.tolist() == [[3] * width] * 2
    counts = StepCounts.of([batch], tasks=2)
    assert counts.tokens_K.sum() == 0 and counts.micro_batches == 0


@given(st.lists(st.integers(1, 64), max_size=200))
def test_rows_hold_every_sample_once_and_fit(lengths):
    for builder in (Pack(), Pad()):
        rows = builder.rows(lengths, 64)
        assert sorted(i for row in rows for i in row) == list(range(len(lengths)))
        assert all(row and sum(lengths[i] for i in row) <= 64 for row in rows)


def test_best_fit_takes_the_fullest_row():
    assert Pack().rows([5, 7, 3, 1, 4], 8) == [[1, 3], [0, 2], [4]]


@pytest.fixture
def lengths():
    """Mean 228, median 165, 95th percentile 616, as measured over tasks of code."""
    random = np.random.default_rng(0)
    return np.clip(random.lognormal(5.1, 0.8, 4096).astype(int), 8, 1024)


@pytest.mark.parametrize(("seq_length", "least"), [(1024, 0.99), (4096, 0.995)])
def test_rows_are_filled(lengths, seq_length, least):
    rows = Pack().rows(lengths, seq_length)
    assert lengths.sum() / (len(rows) * seq_length) >= least


def test_groups_of_similar_length_leave_little_padding(lengths):
    builder = Pad(length_group=4)
    part = lengths[: builder.window(4096)]
    groups = builder.groups(builder.rows(part, 1024), part)
    assert sorted(i for group in groups for row in group for i in row) == list(range(200))
    assert {len(group) for group in groups} == {4}
    assert part.sum() / sum(4 * max(part[i] for row in group for i in row) for group in groups) >= 0.95
    assert [len(g) for g in Pad(length_group=1).groups([[0], [1]], [3, 9])] == [1, 1]
    assert [len(g) for g in Pad(PadTo.seq_length).groups([[0], [1]], [3, 9])] == [1, 1]
