"""How often tasks come: exactly once, by shares, by temperature; evenly, and the same on any number of
ranks."""

from itertools import islice

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mft.data.cache.store import Samples
from mft.data.mixture import Streams, account, counts_per_epoch, spaced
from mft.data.packing import Pack, Pad
from mft.data.sampler import Sampler, deal
from mft.data.settings import DataSettings
from mft.errors import UserError
from tests.data.conftest import chat

NAMES = ["large", "small", "tiny"]
SIZES = [400, 90, 10]


@pytest.fixture
def samples(make_store):
    """400 samples of 1 to 40 trained words, 90 of one, 10 of 60."""
    words = {"large": lambda i: i % 40 + 1, "small": lambda i: 1, "tiny": lambda i: 60}
    stores = [
        make_store([chat(f"{name} {i}?", "x " * words[name](i)) for i in range(size)], name, split=[1, 0, 0])
        for name, size in zip(NAMES, SIZES, strict=True)
    ]
    return Samples(stores)


def mixed(samples, shares=(None, None, None), **change):
    return counts_per_epoch(samples, shares, DataSettings(**change))


def epochs_of(samples, count_K, builder, epochs, rows_per_step=8):
    """The numbers of the samples of each epoch, in order."""
    sampler = Sampler(samples, builder, 256, rows_per_step, seed=5, window=100, count_K=count_K)
    found = []
    for epoch in range(epochs):
        steps = islice(sampler.steps(epoch), sampler.steps_in_epoch(epoch))
        found.append([i for rows, _ in steps for row in rows for i in row])
    return found


sizes = st.lists(st.integers(0, 300), min_size=1, max_size=5).filter(any)


@settings(max_examples=60, deadline=None)
@given(sizes, st.integers(0, 2**31), st.integers(0, 40))
def test_a_natural_epoch_is_every_sample_once(sizes, seed, epoch):
    numbers = Streams(sizes, None, seed).epoch(epoch)
    assert sorted(numbers.tolist()) == list(range(sum(sizes)))


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.tuples(st.integers(1, 60), st.floats(0.01, 200)), min_size=1, max_size=4),
    st.integers(0, 2**31),
    st.integers(1, 12),
)
def test_no_sample_comes_a_second_time_before_all_of_its_task_have_come(tasks, seed, epochs):
    size_K, count_K = zip(*tasks, strict=True)
    streams = Streams(size_K, count_K, seed)
    times = np.zeros(sum(size_K), int)
    for epoch in range(epochs):
        np.add.at(times, streams.epoch(epoch), 1)
    start = 0
    for size, taken, count in zip(size_K, streams.taken(epochs), count_K, strict=True):
        mine = times[start : start + size]
        assert mine.sum() == taken and abs(taken - epochs * count) < 1 + 1e-5
        assert mine.max() - mine.min() <= 1
        start += size


def test_small_tasks_that_are_repeated_often_come_in_full_passes():
    streams = Streams([3], [10_000], 0)
    numbers = np.concatenate([streams.epoch(0), streams.epoch(1)])
    assert abs(np.bincount(numbers) - 20_000 / 3).max() < 1


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(1, 400), min_size=1, max_size=6), st.integers(1, 128), st.integers(0, 2**31))
def test_no_task_is_starved_in_any_stretch(sizes, stretch, seed):
    labels = np.repeat(np.arange(len(sizes)), sizes)
    ordered = labels[spaced(labels, np.random.default_rng(seed))]
    stretch = min(stretch, len(labels))
    for label, size in enumerate(sizes):
        share = size / len(labels)
        counts = np.convolve(ordered == label, np.ones(stretch, int), "valid")
        assert counts.min() >= share * (stretch - 2 * len(sizes)) - 1
        assert counts.max() <= share * (stretch + 2 * len(sizes)) + 1


@pytest.mark.parametrize("builder", [Pack(), Pad(), Pad(length_group=1)])
def test_each_step_holds_what_the_share_implies(samples, builder):
    """Tasks of 80, 18 and 2 %: a plain shuffle leaves `tiny` out of 27 % of the steps of 64 rows (padded)."""
    sampler = Sampler(samples, builder, 256, 64, seed=5)
    steps = [rows for rows, _ in islice(sampler.steps(), sampler.steps_in_epoch(0))][:-1]
    assert steps
    for rows in steps:
        here = np.bincount(samples.task_N[[i for row in rows for i in row]], minlength=3)
        part = sum(map(len, rows)) / 500
        # A group of similar length is one draw: 16 of them in a step.
        spread = 4 if builder == Pad() else 2
        assert (here >= np.array(SIZES) * part * 0.5 - spread).all(), here
        assert here[2] >= 1 or builder == Pad()


@pytest.mark.parametrize("builder", [Pack(), Pad()])
def test_shares_by_samples_are_reached_and_the_rest_comes_in_the_next_epochs(samples, builder):
    count_K = mixed(samples, (1.0, 2.0, 1.0), mixture="shares")
    assert count_K.tolist() == [125, 250, 125]
    epochs = epochs_of(samples, count_K, builder, 4)
    for numbers in epochs:
        assert np.bincount(samples.task_N[numbers]).tolist() == [125, 250, 125]
    large = [{n for n in numbers if samples.task_N[n] == 0} for numbers in epochs]
    assert len(set.union(*large[:3])) == 375 and len(set.union(*large)) == 400, "other samples in each epoch"


def test_a_share_of_nothing_and_shares_without_anything(samples):
    assert mixed(samples, (None, 0.0, 3.0), mixture="shares").tolist() == [125, 0, 375]
    numbers = epochs_of(samples, mixed(samples, (1.0, 0.0, 0.0), mixture="shares"), Pack(), 1)[0]
    assert set(samples.task_N[numbers]) == {0}
    with pytest.raises(UserError, match=r"task\.<name>\.share: no task"):
        mixed(samples, (0.0, 0.0, 0.0), mixture="shares")


def test_shares_by_tokens_are_shares_of_what_carries_loss(samples):
    count_K = mixed(samples, (1.0, 1.0, 1.0), mixture="shares", mixture_by="tokens")
    numbers = np.concatenate(epochs_of(samples, count_K, Pack(), 6))
    trained = np.array([samples.stores[samples.task_N[i]].trained_N[samples.index_N[i]] for i in range(500)])
    tokens_K = np.bincount(samples.task_N[numbers], trained[numbers])
    assert np.abs(tokens_K / tokens_K.sum() - 1 / 3).max() < 0.01
    assert abs(tokens_K.sum() / 6 / trained.sum() - 1) < 0.01, "an epoch is as long as the natural one"


def test_temperature_goes_from_natural_to_equal_shares(samples):
    assert mixed(samples).tolist() == SIZES
    assert mixed(samples, mixture="temperature", mixture_temperature=1.0) == pytest.approx(SIZES, abs=1e-9)
    assert mixed(samples, mixture="temperature", mixture_temperature=1e9) == pytest.approx([500 / 3] * 3)
    part_K = np.sqrt(SIZES)
    assert mixed(samples, mixture="temperature", mixture_temperature=2) == pytest.approx(
        500 * part_K / part_K.sum()
    )
    natural = Streams(SIZES, mixed(samples, mixture="temperature", mixture_temperature=1.0), 3).epoch(2)
    assert sorted(natural.tolist()) == list(range(500)), "a share's rounding takes or gives no sample"


@pytest.mark.parametrize("builder", [Pack(), Pad()])
@pytest.mark.parametrize("shares", [(None, None, None), (1.0, 2.0, 1.0)])
def test_a_run_goes_on_in_any_epoch_and_on_any_number_of_ranks_with_the_same_samples(
    samples, builder, shares
):
    count_K = mixed(samples, shares, mixture="shares" if any(shares) else "natural")

    def sampler():
        return Sampler(samples, builder, 256, 8, seed=5, window=100, count_K=count_K)

    def of_a_step(rows, world):
        length = samples.row_length if builder.by_length else None
        hands = [deal(rows, rank, world, 8 // (2 * world), length) for rank in range(world)]
        return sorted(i for hand in hands for micro in hand for row in micro for i in row)

    whole = list(islice(sampler().steps(), 2 * sampler().steps_in_epoch(0) + 20))
    for done in (
        3,
        sampler().steps_in_epoch(0) - 1,
        sampler().steps_in_epoch(0),
        sampler().steps_in_epoch(0) + 7,
    ):
        state = whole[done - 1][1]
        for world in (1, 2, 4):
            rest = [of_a_step(rows, world) for rows, _ in islice(sampler().steps(*state), 4)]
            assert rest == [of_a_step(rows, 1) for rows, _ in whole[done : done + 4]]


def test_the_account_says_what_a_run_takes(samples):
    count_K = mixed(samples, (1.0, 2.0, 1.0), mixture="shares")
    said = account(samples, NAMES, Streams(SIZES, count_K, 0), 2.5)
    assert said["small"]["samples"] == 90 and said["small"]["natural_share"] == 0.18
    assert said["small"]["share"] == pytest.approx(0.5, abs=0.002)
    assert said["small"]["epochs"] == pytest.approx(2.5 * 250 / 90, abs=0.02)
    assert sum(task["trained_share"] for task in said.values()) == pytest.approx(1, abs=1e-5)
    assert said["tiny"]["trained_share"] > 0.7, "few samples, most of the tokens"
