from itertools import islice

import numpy as np
import pytest

from mft.data.cache.store import Samples
from mft.data.packing import Pack, Pad
from mft.data.sampler import Sampler, deal, draw, eval_batches, spread
from mft.errors import UserError
from tests.data.conftest import chat


@pytest.fixture
def samples(make_store):
    a = make_store([chat(f"What is {i}?", "x " * (i % 40 + 1)) for i in range(300)], "a", split=[1, 0, 0])
    b = make_store([chat(f"Name {i}?", "y") for i in range(50)], "b", split=[1, 0, 0])
    return Samples([a, b])


def sampler(samples, builder=None, **change):
    values = {"seq_length": 128, "rows_per_step": 8, "seed": 3, "window": 100} | change
    return Sampler(samples, builder or Pack(), **values)


def epoch_of(s, epoch):
    return list(islice(s.steps(epoch), s.steps_in_epoch(epoch)))


@pytest.mark.parametrize("builder", [Pack(), Pad()])
def test_an_epoch_is_every_sample_once(samples, builder):
    s = sampler(samples, builder)
    for epoch in (0, 1):
        steps = epoch_of(s, epoch)
        assert all(len(rows) == 8 for rows, _ in steps)
        assert sorted(i for rows, _ in steps for row in rows for i in row) == list(range(350))
        assert all(row for rows, _ in steps[:-1] for row in rows), "only the last step may have empty rows"
        assert steps[-1][1] == (epoch + 1, 0)
        assert [state for _, state in steps[:-1]] == [(epoch, 8 * n) for n in range(1, len(steps))]


def test_a_complete_last_step_ends_the_epoch(samples):
    s = sampler(samples, Pad(), rows_per_step=35)
    steps = epoch_of(s, 0)
    assert len(steps) == 10 and steps[-1][1] == (1, 0) and all(row for rows, _ in steps for row in rows)


def test_order_follows_seed_and_epoch_only(samples):
    def first(**change):
        return [rows for rows, _ in islice(sampler(samples, **change).steps(), 5)]

    assert first() == first()
    assert first() != first(seed=4)
    assert first() != [rows for rows, _ in islice(sampler(samples).steps(1), 5)]
    narrow = [row for rows in first(rows_per_step=4) for row in rows]
    assert narrow == [row for rows in first() for row in rows][:20]


@pytest.mark.parametrize("builder", [Pack(), Pad()])
def test_resuming_anywhere_continues_exactly(samples, builder):
    whole = list(
        islice(sampler(samples, builder).steps(), 2 * sampler(samples, builder).steps_in_epoch(0) + 2)
    )
    for done, (_, state) in enumerate(whole[:-1], start=1):
        rest = list(islice(sampler(samples, builder).steps(*state), 3))
        assert rest == whole[done : done + 3] or len(whole) - done < 3


def test_resuming_with_another_step_size_goes_on_with_the_next_row(samples):
    rows, state = next(sampler(samples, rows_per_step=6).steps())
    following, _ = next(sampler(samples, rows_per_step=8).steps(*state))
    both, _ = next(sampler(samples, rows_per_step=14).steps())
    assert rows + following == both


def test_rows_of_a_window_are_not_in_order_of_length(samples):
    lengths = [len(row) for rows, _ in epoch_of(sampler(samples, window=350), 0) for row in rows if row]
    assert lengths != sorted(lengths)
    half = len(lengths) // 2
    assert 0.5 < np.mean(lengths[:half]) / np.mean(lengths[half:]) < 2


def test_windows_are_at_least_as_large_as_asked(samples):
    asked = []

    class Watching(Pad):
        def rows(self, lengths, seq_length):
            asked.append(len(lengths))
            return super().rows(lengths, seq_length)

    sampler(samples, Watching(length_group=1), window=100).steps_in_epoch(0)
    assert asked == [100, 100, 150]


@pytest.mark.parametrize(("world", "accumulation"), [(1, 4), (2, 2), (4, 1), (1, 1), (8, 1)])
def test_ranks_and_micro_batches_hold_the_step_exactly(samples, world, accumulation):
    for rows, _ in epoch_of(sampler(samples), 0):
        dealt = [deal(rows, rank, world, accumulation) for rank in range(world)]
        assert all(len(micro) == accumulation for micro in dealt)
        flat = [row for micro in dealt for batch in micro for row in batch]
        assert all(len(batch) == 8 // (world * accumulation) for micro in dealt for batch in micro)
        assert sorted(flat) == sorted(rows)


def test_empty_rows_spread_over_the_ranks():
    rows = [[0], [1], [2], [], [], [], [], []]
    assert [deal(rows, rank, 2, 1) for rank in range(2)] == [[[[0], [2], [], []]], [[[1], [], [], []]]]


@pytest.mark.parametrize("world", [1, 2, 4])
def test_rows_dealt_by_length_meet_their_like(samples, world):
    for rows, _ in islice(sampler(samples, Pad(), rows_per_step=32).steps(), 11):
        dealt = [deal(rows, rank, world, 8 // world, samples.row_length) for rank in range(world)]
        assert sorted(row for hand in dealt for micro in hand for row in micro) == sorted(rows)
        lengths = [
            samples.row_length(row) for turn in zip(*dealt, strict=True) for micro in turn for row in micro
        ]
        assert lengths == sorted(lengths, reverse=True), "the longest first, and side by side on the ranks"


def test_the_benchmark_of_fill_tells_the_ways_apart(samples):
    from benchmarks.fill import Sequential, fill

    plain, grouped, packed = Pad(length_group=1), Pad(length_group=4), Pack()
    assert fill(samples, plain, 128) == pytest.approx(samples.lengths_N.sum() / (350 * 128))
    padded = [fill(samples, b, 128, 2, longest=True, sort=b is grouped) for b in (plain, grouped)]
    assert padded[0] < 0.85 < padded[1]
    assert fill(samples, Sequential(), 128) < fill(samples, packed, 128)


def test_no_samples_are_refused(samples):
    with pytest.raises(UserError, match=r"data\.split: no sample is left for training"):
        sampler(Samples(samples.stores, "valid"))


def test_evaluation_takes_evenly_spaced_samples_of_each_task(samples):
    numbers = spread(samples, 100)
    assert np.bincount(samples.task_N[numbers]).tolist() == [100, 50]
    assert numbers[:4].tolist() == [0, 3, 6, 9]
    assert spread(samples, 0).tolist() == list(range(350))
    assert [samples.origin(i).rsplit(":", 1)[1] for i in spread(samples, 3)] == [
        "1",
        "101",
        "201",
        "1",
        "17",
        "34",
    ]


@pytest.mark.parametrize("builder", [Pack(), Pad()])
@pytest.mark.parametrize("world", [1, 2, 3])
def test_evaluation_is_shared_evenly_and_completely(samples, builder, world):
    chosen = spread(samples, 20)
    ranks = [eval_batches(samples, chosen, builder, 128, 4, rank, world) for rank in range(world)]
    assert len({len(batches) for batches in ranks}) == 1
    assert all(len(batch) <= 4 for batches in ranks for batch in batches)
    assert len({len(batch) for batches in ranks for batch in batches}) == 1
    numbers = sorted(i for batches in ranks for batch in batches for row in batch for i in row)
    assert numbers == sorted(chosen.tolist())
    empty = Samples(samples.stores, "valid")
    assert eval_batches(empty, spread(empty, 20), builder, 128, 4) == []


def test_a_draw_follows_seed_and_step_and_takes_some_of_each_task(samples):
    numbers = draw(samples, 60, seed=1, step=5)
    assert len(set(numbers.tolist())) == 110
    assert np.bincount(samples.task_N[numbers]).tolist() == [60, 50]
    assert numbers.tolist() == draw(samples, 60, seed=1, step=5).tolist()
    assert (
        numbers.tolist()
        != draw(samples, 60, seed=1, step=6).tolist()
        != draw(samples, 60, seed=2, step=6).tolist()
    )
    assert draw(Samples(samples.stores, "valid"), 60, seed=1, step=5).tolist() == []
