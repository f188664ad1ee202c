"""Through the real loop and engine: every mode does the same however a global batch is split over ranks,
micro-batches and rows, and on every backend."""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path

import pytest

from tests.distributed.ranks import run_ranks
from tests.loss.loop import Layout, Played, played, write_tasks
from tests.loss.modes import MODES
from tests.selection import long, selected

pytestmark = [pytest.mark.slow, pytest.mark.dist]

ONE = {
    "1x1 pad": Layout(1, packed=False, backend="single"),
    "1x4 pad": Layout(4, packed=False, backend="single"),
    "1x1 pack": Layout(1, packed=True, backend="single"),
    "1x4 pack": Layout(4, packed=True, backend="single"),
}
TWO = {"2x2 pad": Layout(2, packed=False), "2x2 pack": Layout(2, packed=True)}
FOUR = {"4x1 pad": Layout(1, packed=False), "4x1 pack": Layout(1, packed=True)}
SHARDED = {
    f"{backend} 2x2": Layout(2, packed=False, backend=backend) for backend in ("zero2", "zero3", "fsdp")
}
LAYOUTS = [*ONE, *TWO, *FOUR][1:]
BY_SOURCE = {"probes": "coba", "training losses": "lbtw", "statistics and repeats": "famo"}
"""One adaptive mode of each way of learning, played on the backends that shard."""


PAIRS = [
    (mode, layout) if mode in ("task_token_mean", "coba") or layout == "2x2 pack" else long(mode, layout)
    for mode in MODES
    for layout in LAYOUTS
]
"""A mode without and one with a history in every layout, and every mode in the one that splits a batch in all
ways at once."""

DIVIDED = [("coba", "zero3 2x2"), ("lbtw", "zero2 2x2"), ("famo", "fsdp 2x2")]
"""Each way of learning, and each backend that divides."""


def everything(
    root: Path,
    pairs: Collection[tuple[str, str]] | None = None,
    sharded: Collection[str] = tuple(BY_SOURCE.values()),
) -> dict[str, dict[str, Played]]:
    """Plays pairs of mode and layout (None: all of them), and every mode whole; returns what each did, by
    layout.

    sharded: the modes that are played on the backends of SHARDED.
    """
    write_tasks(root / "tasks")
    found = {}
    for world, layouts in ((1, ONE), (2, TWO | SHARDED), (4, FOUR)):
        plan = []
        for name, layout in layouts.items():
            modes = sharded if name in SHARDED else MODES
            plan.append(
                (layout, [m for m in modes if pairs is None or name == "1x1 pad" or (m, name) in pairs])
            )
        results = played(str(root), plan) if world == 1 else run_ranks(world, played, str(root), plan)[0]
        found |= dict(zip(layouts, results, strict=True))
    return found


@pytest.fixture(scope="module")
def results(
    tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest
) -> dict[str, dict[str, Played]]:
    return everything(tmp_path_factory.mktemp("layouts"), selected(request, "mode", "layout"))


def differences(found: Played, whole: Played) -> dict[str, float]:
    """Returns the largest relative difference of the losses, of the weights, and of the update (as one
    vector)."""
    assert [set(row) for row in found.weights] == [set(row) for row in whole.weights]
    pairs = [
        (row[name], other[name])
        for row, other in zip(found.weights, whole.weights, strict=True)
        for name in row
    ]
    return {
        "loss": max(abs(a - b) / abs(b) for a, b in zip(found.losses, whole.losses, strict=True)),
        "weights": max((abs(a - b) / max(abs(b), 1e-3) for a, b in pairs), default=0.0),
        "update": float((found.update - whole.update).norm() / whole.update.norm()),
    }


@pytest.mark.parametrize(("mode", "layout"), PAIRS)
def test_the_global_batch_counts_and_not_its_layout(results, mode: str, layout: str) -> None:
    found = differences(results[layout][mode], results["1x1 pad"][mode])
    assert max(found.values()) <= 1e-6, found


@pytest.mark.parametrize(
    ("mode", "layout"),
    [
        (mode, layout) if (mode, layout) in DIVIDED else long(mode, layout)
        for mode in BY_SOURCE.values()
        for layout in SHARDED
    ],
)
def test_backends_that_shard_do_the_same(results, mode: str, layout: str) -> None:
    found = differences(results[layout][mode], results["1x1 pad"][mode])
    assert max(found.values()) <= 1e-6, found


@pytest.mark.parametrize("mode", MODES)
def test_the_runs_compared_above_do_train_and_move_their_weights(results, mode: str) -> None:
    played = results["1x1 pad"][mode]
    assert float(played.update.norm()) > 0.1 and len(set(played.losses)) == len(played.losses)
    if played.weights[0]:
        assert played.weights[0] != played.weights[-1]
        assert all(sum(row.values()) == pytest.approx(1) for row in played.weights)
