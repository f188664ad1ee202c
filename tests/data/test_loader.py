"""How many steps a run has, and what its loader deals."""

from itertools import islice

import pytest

from mft.batch import BatchSizes
from mft.data.cache.store import Samples
from mft.data.loader import BatchLoader
from mft.data.packing import Pack, Pad
from mft.data.settings import DataSettings
from mft.training.settings import TrainSettings
from tests.data.conftest import chat


@pytest.fixture
def store(make_store):
    return make_store([chat(f"q{i}", "a" * (i % 5 + 1)) for i in range(40)], split=[1, 0, 0])


def loader(store, per_step=4, rank=0, world=1, **train):
    sizes = BatchSizes(per_step // world, 1, world)
    return BatchLoader(
        [store], Pad(), sizes, rank, 0, TrainSettings(**train), DataSettings(seq_length=64), [None]
    )


@pytest.mark.parametrize(
    ("epochs", "max_steps", "steps"),
    [
        (1, None, 10),
        (3, None, 30),
        (0.5, None, 5),
        (0.01, None, 1),
        (1.25, None, 13),
        (3, 7, 7),
        (0.5, 7, 5),
        (1, 10, 10),
    ],
)
def test_the_steps_of_a_run(store, epochs, max_steps, steps):
    assert loader(store, epochs=epochs, max_steps=max_steps).total_steps() == steps


def test_an_incomplete_last_step_counts(store):
    assert loader(store, per_step=12, epochs=1).total_steps() == 4


def test_ranks_see_the_rows_of_one_process_and_none_twice(store):
    def seen(found, steps=3):
        return [
            [sample for b in step.batches for sample in b.samples]
            for step in islice(found.steps(0, 0), steps)
        ]

    whole = seen(loader(store, epochs=1))
    parts = [seen(loader(store, rank=rank, world=2, epochs=1)) for rank in (0, 1)]
    assert [sorted(step) for step in whole] == [sorted([*one, *two]) for one, two in zip(*parts, strict=True)]


def test_a_validation_makes_its_micro_batches_as_they_are_asked_for(make_store, monkeypatch):
    store = make_store([chat(f"q{i}", "aa") for i in range(12)], split=[1, 1, 0])
    loads, load = [], Samples.load
    monkeypatch.setattr(Samples, "load", lambda *given: loads.append(1) or load(*given))
    found = loader(store, per_device_eval_batch_size=2).validation()
    for number, batch in enumerate(found, start=1):
        assert len(loads) == number and batch.layout.tokens > 0
    assert len(loads) > 1


def test_as_many_steps_as_asked_for(store):
    assert len(list(loader(store).steps(0, 0, 12))) == 12


def test_steps_go_on_from_any_place(store):
    whole = list(islice(loader(store, epochs=2).steps(0, 0), 14))
    for done in (3, 9, 10, 12):
        step = whole[done - 1]
        rest = list(islice(loader(store, epochs=2).steps(step.epoch, step.rows_consumed), 2))
        assert [b.samples for s in rest for b in s.batches] == [
            b.samples for s in whole[done : done + 2] for b in s.batches
        ]


def test_the_largest_micro_batch_has_full_packed_rows_or_the_longest_sample_and_every_token_trained(store):
    padded = loader(store).largest(3)
    longest = int(store.lengths_N.max())
    assert padded.ids_BT.shape == (3, longest) and padded.layout.tokens == 3 * longest
    assert len(padded.layout.trained_n) == 3 * (longest - 1)
    given = loader(store)
    given.rows, given.data = Pack(), DataSettings(seq_length=2 * longest + 1)
    packed = given.largest(2)
    assert packed.ids_BT.shape == (2, 2 * longest + 1) and packed.layout.tokens == 2 * (2 * longest + 1)
    assert packed.layout.packed
