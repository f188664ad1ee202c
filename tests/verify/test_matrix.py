"""Backends × peft modes × rows × loss modes: stopped and resumed, each is the uninterrupted run to the bit.

`make test` takes a slice in which every backend, peft mode and kind of rows occurs, `make check-all` all 240 cells.
Every loss mode is interrupted in tests/loss/test_resume.py.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from mft.files.json_file import read_json
from mft.run_folder import metric_rows
from mft.training.trace import read
from mft.verify.difference import first_difference
from tests.selection import long, selected
from tests.verify.matrix import ALL, AT, LOSSES, STEPS, Key, checked, frozen, play_all

pytestmark = [pytest.mark.slow, pytest.mark.dist]

SLICE: list[Key] = [
    ("single", "lora", "pack", "coba"),
    ("ddp", "lora", "pad", "famo"),
    ("zero2", "full", "pack", "famo_valid"),
    ("zero3", "full", "pad", "dwa"),
    ("fsdp", "qlora", "pack", "self_paced"),
]


@pytest.fixture(scope="module")
def played(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> dict[Key, list[Path]]:
    """The two run folders of every selected cell."""
    root = tmp_path_factory.mktemp("matrix")
    cells = checked(root, [key for key in ALL if key in selected(request, "dist", "peft", "data", "loss")])
    assert not [cell.refusal for cell in cells.values() if cell.refusal]
    folders = frozen(root, cells)
    for resume in (False, True):
        play_all(cells, folders, resume)
    return folders


@pytest.mark.parametrize(
    ("dist", "peft", "data", "loss"), [key if key in SLICE else long(*key) for key in ALL]
)
def test_stopped_and_resumed_is_uninterrupted(
    played: dict[Key, list[Path]], dist: str, peft: str, data: str, loss: str
) -> None:
    whole, parts = played[dist, peft, data, loss]
    assert first_difference(whole, parts) is None
    # that the comparison had something to compare
    ranks = read(parts)
    assert len(ranks) == (1 if dist == "single" else 2)
    assert all([step for step, _ in lines] == [*range(1, STEPS + 1)] for lines in ranks.values())
    assert (parts / "checkpoints" / f"step-{AT}").is_dir()
    assert not (whole / "checkpoints" / f"step-{AT}").exists()
    rows, _ = metric_rows(parts / "metrics.jsonl")
    assert [row["step"] for row in rows if "valid/loss" in row] == [0, AT, STEPS]
    weights = [row["train/weight/left"] for row in rows[AT:] if "train/weight/left" in row]
    if loss != "task_token_mean":
        assert len(set(weights)) > 1, "a weight that stands still proves nothing"
    assert read_json(whole / "summary.json").text("status") == "finished"


def test_every_value_but_of_the_losses_occurs_in_the_slice() -> None:
    assert len(ALL) == 240 and set(LOSSES) == {loss for *_, loss in ALL}
    for axis in range(3):
        assert {key[axis] for key in SLICE} == {key[axis] for key in ALL}
