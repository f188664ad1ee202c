"""Ranks that look for the largest micro-batch together. How much memory each has is given by the test."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pytest
import torch

from mft.estimate.room import Host, Room
from mft.files.json_file import read_json
from mft.run_folder import MICRO_BATCH
from tests.distributed.ranks import run_ranks
from tests.distributed.runs import Tree, logged, play, weights
from tests.selection import long, selected

pytestmark = [pytest.mark.slow, pytest.mark.dist]

GIVEN = ("peft=lora", "peft.dropout=0.1", "train.max_steps=4", "train.global_batch_size=16", "data=pack")


class OfRank(Room):
    """Rank 0 has room for 4 rows, and rank 1 for 2."""

    def reset(self) -> None:
        pass

    def used(self) -> float:
        return 1.0 * 2**30

    def peak(self) -> float:
        return (self.tried + 1.0) * 2**30


def play_with_little_room(run_dirs: Sequence[Path]) -> None:
    """Plays runs on ranks of which the second has less memory."""
    from mft.data.loader import BatchLoader

    largest = BatchLoader.largest
    rank = torch.distributed.get_rank()
    room = OfRank((5.5 - 2 * rank) * 2**30, 9.0 * 2**30, "", "CPU")

    def noted(loader: BatchLoader, rows: int) -> object:
        room.tried = rows
        return largest(loader, rows)

    Host.of = lambda processes: room  # type: ignore[method-assign, assignment]
    BatchLoader.largest = noted  # type: ignore[method-assign, assignment]
    play(run_dirs)


@pytest.fixture(scope="module")
def tree(tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest) -> Tree:
    tree = Tree(tmp_path_factory.mktemp("micro-batch"))
    sizes = {"auto": "auto", "hand": "2"}
    folders = {
        case: [
            tree.frozen(backend, case, (*GIVEN, f"train.per_device_batch_size={size}"))
            for backend in sorted(selected(request, "backend"))
        ]
        for case, size in sizes.items()
    }
    run_ranks(2, play, folders["hand"])
    run_ranks(2, play_with_little_room, folders["auto"])
    return tree


@pytest.mark.parametrize("backend", ["ddp", long("zero2"), "zero3", long("fsdp")])
def test_the_search_changes_no_bit_of_the_run_and_the_rank_with_less_room_decides(
    tree: Tree, backend: str
) -> None:
    found, by_hand = tree.folder(backend, "auto"), tree.folder(backend, "hand")
    recorded = read_json(found / MICRO_BATCH)
    assert recorded["per_device_batch_size"] == 2 and recorded["devices"] == ["CPU", "CPU"]
    for name in ("train/loss", "grad_norm", "valid/loss"):
        assert logged(found, name) == logged(by_hand, name)
    one, two = weights(found / "final"), weights(by_hand / "final")
    assert one.keys() == two.keys() and all(torch.equal(value, two[name]) for name, value in one.items())
