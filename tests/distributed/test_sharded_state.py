"""Files of the resume state: what writing them takes, what may be missing, those of earlier versions."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from mft.distributed.ddp import Ddp, Single
from mft.distributed.deepspeed import Zero2, Zero3
from mft.distributed.fsdp import Fsdp
from mft.errors import UserError
from tests.distributed.memory import Watch, give_back_what_is_freed, save_all_at_once
from tests.distributed.ranks import run_ranks
from tests.distributed.test_engine import Model, prepared, train, trained


def rises(folder: Path) -> dict[str, float]:
    """Saves six weights of 8 MiB with twice as much of the optimizer; returns in MiB how far this process's
    memory rose."""
    give_back_what_is_freed()
    engine = Single().start("fp32", cpu=True)
    model = torch.nn.Sequential(*(torch.nn.Linear(2048, 1024, bias=False) for _ in range(6)))
    module, optimizer = engine.prepare(model, torch.optim.AdamW(model.parameters()))
    for parameter in module.parameters():
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    optimizer.zero_grad()
    (folder / "at once").mkdir()
    with Watch() as at_once:
        save_all_at_once(engine, folder / "at once")
    with Watch() as one_by_one:
        engine.save_state(folder / "state")
    found = {"state": engine.state_size() / 2**20, "at once": at_once.peak, "one by one": one_by_one.peak}
    engine.close()
    return found


def test_no_second_copy_of_the_state_is_in_memory_while_it_is_saved(tmp_path: Path) -> None:
    (found,) = run_ranks(1, rises, tmp_path)
    assert found["state"] == pytest.approx(6 * 8 * 3, abs=0.1)
    assert found["at once"] > 0.9 * found["state"]  # what is measured does see copies
    assert found["one by one"] < 8, "more than one tensor"


class Layers(Model):
    """With the layers that FSDP divides."""

    def layer_classes(self) -> list[str]:
        return ["Linear"]


def saved_sizes(folder: Path) -> dict[str, tuple[int, int, int]]:
    """Saves on every backend; returns of this rank what it said it would write, what it wrote, and the bytes
    of the whole trained weights."""
    found = {}
    for backend in (Ddp(), Zero2(), Zero3(persistence_threshold=0), Fsdp()):
        engine = backend.start("fp32", cpu=True)
        module, optimizer = prepared(engine, kind=Layers)
        train(engine, module, optimizer, range(1), 1.0)
        said, state = engine.state_size(), folder / engine.name
        engine.save_state(state)
        wrote = sum(path.stat().st_size for path in state.glob(f"*-{engine.rank}.safetensors"))
        found[engine.name] = said, wrote, engine.full_size(trainable=True)
        engine.close()
    return found


@pytest.mark.slow
@pytest.mark.dist
def test_every_backend_knows_what_it_is_about_to_write(tmp_path: Path) -> None:
    ranks = run_ranks(2, saved_sizes, tmp_path)
    weights = 4 * (8 * 8 + 8 + 8 + 1)
    for name in ranks[0]:
        assert all(rank[name][0] == rank[name][1] for rank in ranks), name
        assert all(rank[name][2] == weights for rank in ranks), name
        assert (ranks[1][name][0] > 0) == (name != "ddp")


@pytest.fixture
def saved(tmp_path: Path) -> tuple[Path, dict[str, torch.Tensor], list[float]]:
    """A state after two steps, its trained weights, and the gradient norms of the two steps that follow."""
    engine = Single().start("fp32", cpu=True)
    module, optimizer = prepared(engine)
    train(engine, module, optimizer, range(2), 1.0)
    engine.save_state(tmp_path)
    weights, norms = trained(engine), train(engine, module, optimizer, range(2, 4), 1.0)
    engine.close()
    return tmp_path, weights, norms


def test_the_weights_are_read_where_nothing_else_was_kept(saved: Any) -> None:
    folder, weights, _ = saved
    for name in ("optimizer-0.safetensors", "rng-0.pt"):
        (folder / name).unlink()
    engine = Single().start("fp32", cpu=True)
    prepared(engine)
    with pytest.raises(UserError, match=r"optimizer-0\.safetensors is missing"):
        engine.load_state(folder)
    engine.load_weights(folder)
    assert all(torch.equal(value, trained(engine)[name]) for name, value in weights.items())
    engine.close()


def test_a_state_of_an_earlier_version_with_all_in_one_file_goes_on_to_the_bit(saved: Any) -> None:
    folder, weights, norms = saved
    paths = [folder / f"{kind}-0.safetensors" for kind in ("shard", "optimizer")]
    entries = []
    for path in paths:
        with safe_open(path, "pt") as file:
            entries.append(json.loads(file.metadata()["pieces"]))
    joined = [place | piece for place, piece in zip(*entries, strict=True)]
    save_file(load_file(paths[0]) | load_file(paths[1]), paths[0], {"pieces": json.dumps(joined)})
    paths[1].unlink()
    values = json.loads((folder / "engine.json").read_text())
    del values["optimizers"]
    (folder / "engine.json").write_text(json.dumps(values))

    engine = Single().start("fp32", cpu=True)
    module, optimizer = prepared(engine)
    engine.load_weights(folder)
    assert all(torch.equal(value, trained(engine)[name]) for name, value in weights.items())
    assert engine.load_state(folder)
    assert train(engine, module, optimizer, range(2, 4), 1.0) == norms
    engine.close()
