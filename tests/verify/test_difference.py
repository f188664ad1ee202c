"""What the comparison finds: any bit that was changed between a stop and its resume, or in what a run left."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from mft.files.checksums import COMPLETE, seal
from mft.training.trace import Trace
from mft.verify.difference import first_difference
from tests.distributed.ranks import run_ranks
from tests.verify.matrix import AT, STEPS, Key, checked, frozen, play, play_all

pytestmark = [pytest.mark.slow, pytest.mark.dist]

KEY: Key = ("single", "lora", "pad", "lbtw")
"""Adapters with dropout, whose masks come from the random state, and weights that the loss remembers."""


def change(path: Path, key: str, bit: int) -> None:
    """Turns a bit of the first number of one tensor in a file of tensors."""
    with safe_open(str(path), "pt") as file:
        tensors, metadata = {name: file.get_tensor(name) for name in file.keys()}, file.metadata()  # noqa: SIM118
    tensors[key].view(-1)[:1].view(torch.int32).bitwise_xor_(1 << bit)
    save_file(tensors, path, metadata)


def of_the_optimizer(state: Path) -> None:
    path = state / "optimizer-0.safetensors"
    with safe_open(str(path), "pt") as file:
        key = next(name for name in file.keys() if name.endswith("/exp_avg"))  # noqa: SIM118
    change(path, key, 22)


def of_a_parameter(state: Path) -> None:
    # a few thousandths of it: the last bit alone may not reach a loss before some steps
    change(state / "shard-0.safetensors", "1", 14)


def of_the_position(state: Path) -> None:
    values = json.loads((state / "loop.json").read_text())
    values["rows_consumed"] += 1
    (state / "loop.json").write_text(json.dumps(values))


def of_the_random_state(state: Path) -> None:
    values = torch.load(state / "rng-0.pt", weights_only=True)
    torch.manual_seed(1)
    torch.save(values | {"torch": torch.get_rng_state()}, state / "rng-0.pt")


def of_the_loss(state: Path) -> None:
    values = torch.load(state / "loss.pt", weights_only=True)
    values["weight"]["left"] = math.nextafter(values["weight"]["left"], 1.0)
    torch.save(values, state / "loss.pt")


TAMPERINGS = {
    of_the_optimizer: (AT + 2, "train/loss/left"),
    of_a_parameter: (AT, "valid/loss"),
    of_the_position: (AT + 1, "batches"),
    of_the_random_state: (AT + 1, "train/loss"),
    of_the_loss: (AT + 1, "train/weight/left"),
}
"""What is changed in the checkpoint before it is resumed → the first difference that is to be found: its step,
and what."""


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The folders of an uninterrupted run, of one that was stopped and resumed, and of tampered ones."""
    root = tmp_path_factory.mktemp("tampered")
    cells = checked(root, [KEY])
    folders = frozen(root, cells)
    play_all(cells, folders, resume=False)
    whole, parts = folders[KEY]
    found = {"whole": whole, "resumed": parts}
    for tamper in TAMPERINGS:
        found[tamper.__name__] = shutil.copytree(parts, root / tamper.__name__)
        checkpoint = found[tamper.__name__] / "checkpoints" / f"step-{AT}"
        tamper(checkpoint / "state")
        seal(checkpoint, COMPLETE)  # else it is a damaged one, and not resumed from
    # a run whose checkpoint is gone begins anew
    found["anew"] = shutil.copytree(parts, root / "anew")
    shutil.rmtree(found["anew"] / "checkpoints")
    run_ranks(1, play, [(folder, Trace()) for name, folder in found.items() if name != "whole"])
    return found


@pytest.mark.parametrize("tamper", TAMPERINGS)
def test_whatever_is_changed_before_the_resume_is_found(runs: dict[str, Path], tamper: Callable) -> None:
    found = first_difference(runs["whole"], runs[tamper.__name__])
    assert found is not None and (found.step, found.what) == TAMPERINGS[tamper]
    assert found.uninterrupted != found.resumed
    if found.what == "batches":
        assert found.rank == 0 and len(found.uninterrupted) == 32
    else:
        assert float.fromhex(found.uninterrupted) != float.fromhex(found.resumed)


def test_a_run_that_began_anew_is_not_a_resumed_one(runs: dict[str, Path]) -> None:
    found = first_difference(runs["whole"], runs["anew"])
    assert found is not None and (found.what, found.step, found.rank) == ("step trained", AT + 1, 0)
    assert str(found) == f"step {AT + 1}, rank 0, step trained: {AT + 1} uninterrupted, 1 resumed"


def other(runs: dict[str, Path], tmp_path: Path) -> Path:
    """A copy of the resumed run, in which nothing differs yet."""
    copy = shutil.copytree(runs["resumed"], tmp_path / "copy")
    assert first_difference(runs["whole"], copy) is None
    return copy


def test_the_last_bit_of_one_logged_number_is_found(runs: dict[str, Path], tmp_path: Path) -> None:
    copy = other(runs, tmp_path)
    lines = [json.loads(line) for line in (copy / "metrics.jsonl").read_text().splitlines()]
    row = next(row for row in lines if row["step"] == 8)
    for name in ("lr", "train/weight/left", "grad_norm", "train/loss/right"):
        before = row[name]
        row[name] = math.nextafter(before, 9.0)
        (copy / "metrics.jsonl").write_text("".join(f"{json.dumps(line)}\n" for line in lines))
        found = first_difference(runs["whole"], copy)
        assert found is not None
        # the last one stays: what is compared earlier in a step is reported first
        expected = f"step 8, {name}: {before.hex()} uninterrupted, {row[name].hex()} resumed"
        assert str(found) == expected


def test_the_last_bit_of_one_final_number_is_found(runs: dict[str, Path], tmp_path: Path) -> None:
    for place, key, what in (
        (
            f"checkpoints/step-{STEPS}/state/optimizer-0.safetensors",
            "0/exp_avg_sq",
            ", exp_avg_sq of the optimizer",
        ),
        (f"checkpoints/step-{STEPS}/state/shard-0.safetensors", "0", "lora_A"),
        ("final/adapter_model.safetensors", "", "lora_A"),
    ):
        copy = other(runs, tmp_path / Path(place).parts[0] / what)
        with safe_open(str(copy / place), "pt") as file:
            first = key or next(iter(file.keys()))
        change(copy / place, first, 0)
        found = first_difference(runs["whole"], copy)
        assert found is not None and found.step is None
        assert found.what.startswith(f"{place} ") and what in found.what and found.what.endswith("[0]")
        assert float.fromhex(found.uninterrupted) != float.fromhex(found.resumed)
    for name, key, value in (("loss.pt", "forgotten", 1.0), ("rng-0.pt", "torch", None)):
        place_of_it = f"checkpoints/step-{STEPS}/state/{name}"
        other_memory = other(runs, tmp_path / name)
        memory = torch.load(other_memory / place_of_it, weights_only=True)
        memory[key] = memory[key].flip(0) if value is None else value
        torch.save(memory, other_memory / place_of_it)
        seal((other_memory / place_of_it).parents[1], COMPLETE)
        found = first_difference(runs["whole"], other_memory)
        assert found is not None and found.what.startswith(f"{place_of_it}/{key}")
    (copy / place).unlink()
    assert str(first_difference(runs["whole"], copy)) == f"{place}: there uninterrupted, absent resumed"
