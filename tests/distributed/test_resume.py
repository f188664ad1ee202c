"""Runs that are gone on with on another number of ranks, and what the checkpoints of divided runs hold.

On the same ranks a resumed run is the uninterrupted one to the bit: tests/verify/test_matrix.py.
"""

from __future__ import annotations

import itertools
import json
import warnings
from pathlib import Path

import pytest
import torch

from mft.distributed import sharded_state
from mft.distributed.ddp import Ddp, Single
from mft.distributed.sharded_state import Shard
from mft.errors import UserError
from tests.distributed.ranks import run_ranks
from tests.distributed.runs import BACKENDS, LAYOUTS, Tree, largest, logged, play, weights
from tests.distributed.test_engine import prepared, train, trained
from tests.selection import long, selected

PEFTS = ("full", "lora", "qlora")
SETTINGS = (
    "train.max_steps=9",
    "train.save_every=3",
    "train.eval_every=null",
    "train.eval_at_start=false",
    "scheduler=constant",
    *LAYOUTS["pad"],
)
BOTH = [(backend, peft) for backend in BACKENDS for peft in PEFTS]
QUICK = [("ddp", "full"), ("zero2", "lora"), ("zero3", "qlora"), ("fsdp", "full")]
"""Each backend and each peft mode; in `make check-all` all of both."""

HALF = [long("zero2", "lora"), ("zero3", "full"), long("fsdp", "full")]
"""Runs in bf16."""


@pytest.fixture(scope="module")
def tree(tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest) -> Tree:
    """Nine steps on two ranks, saved every third; gone on with from step 3 on one rank, and from there on
    four."""
    tree = Tree(tmp_path_factory.mktemp("resume"))

    def frozen(backend: str, peft: str, case: str, ranks: int, steps: int, start: Path | None = None) -> Path:
        settings = (f"peft={peft}", *SETTINGS, f"train.max_steps={steps}")
        return tree.frozen(backend, f"{peft}-{case}", settings, ranks, start)

    both = [key for key in BOTH if key in selected(request, "backend", "peft")]
    half = [
        tree.frozen(b, f"{p}-half", (f"peft={p}", *SETTINGS, "train.precision=bf16"))
        for b, p in selected(request, "backend", "case")
    ]
    run_ranks(2, play, [*(frozen(backend, peft, "whole", 2, 9) for backend, peft in both), *half])
    fewer = [frozen(b, p, "fewer", 1, 6, tree.step(b, f"{p}-whole", 3)) for b, p in both]
    run_ranks(1, play, fewer)
    more = [frozen(b, p, "more", 4, 9, tree.step(b, f"{p}-fewer", 6)) for b, p in both if p == "full"]
    run_ranks(4, play, more)
    return tree


def backends_and_pefts() -> pytest.MarkDecorator:
    return pytest.mark.parametrize(("backend", "peft"), [key if key in QUICK else long(*key) for key in BOTH])


@pytest.mark.slow
@pytest.mark.dist
@backends_and_pefts()
def test_on_other_numbers_of_ranks_it_sees_the_same_samples(tree: Tree, backend: str, peft: str) -> None:
    whole, fewer = tree.folder(backend, f"{peft}-whole"), tree.folder(backend, f"{peft}-fewer")
    # fp32 sums in another order, through at most six steps of AdamW
    assert largest(logged(whole, "train/loss")[3:6], logged(fewer, "train/loss")) < 1e-6
    assert logged(whole, "train/tokens/left")[3:6] == logged(fewer, "train/tokens/left")
    if peft == "full":
        more = tree.folder(backend, "full-more")
        assert largest(logged(whole, "train/loss")[6:], logged(more, "train/loss")) < 1e-6
        assert logged(whole, "train/tokens/left")[6:] == logged(more, "train/tokens/left")
        first, second = weights(whole / "final"), weights(more / "final")
        assert max(float((value - second[name]).abs().max()) for name, value in first.items()) < 1e-6


@pytest.mark.slow
@pytest.mark.dist
def test_each_rank_writes_its_part_and_nothing_that_would_be_unpickled(tree: Tree) -> None:
    for backend, peft in QUICK:
        state = tree.folder(backend, f"{peft}-whole") / "checkpoints" / "step-9" / "state"
        shards = sorted(path.name for path in state.glob("shard-*"))
        assert shards == ["shard-0.safetensors"] + ([] if backend == "ddp" else ["shard-1.safetensors"])
        sizes = [(state / shard).stat().st_size for shard in shards]
        assert max(sizes) < 1.1 * min(sizes)
        assert {path.suffix for path in state.iterdir()} == {".safetensors", ".json", ".pt"}
        for path in state.glob("*.pt"):
            torch.load(path, weights_only=True)


def updated(state: Path, shapes: dict[str, torch.Size]) -> dict[str, torch.Tensor]:
    """Puts together what the optimizer updated on all ranks, from the files of a resume state."""
    whole = {name: torch.full(shape, float("nan")) for name, shape in shapes.items()}
    mine = [Shard(name, 0, value.view(-1), value, 0) for name, value in whole.items()]
    sharded_state.load(mine, torch.optim.AdamW(list(whole.values())), state, set(whole))
    return whole


def compare(run_dir: Path, last: str, full: bool) -> None:
    """Loads final/ with transformers and peft alone: nothing missing, nothing unexpected, the weights as
    updated, which the checkpoint `last` holds, too."""
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    final, state = run_dir / "final", run_dir / "checkpoints" / last / "state"
    origin = json.loads((final / "mft.json").read_text())["origin"]["path"]
    model, info = AutoModelForCausalLM.from_pretrained(
        final if full else origin, dtype=torch.float32, output_loading_info=True
    )
    assert not any(info.values()), info
    if not full:
        with warnings.catch_warnings():
            warnings.filterwarnings("error", ".*missing adapter keys")
            model = PeftModel.from_pretrained(model, final)
    found = {f"model.{name}": p.detach() for name, p in model.named_parameters() if full or "lora_" in name}
    expected = updated(state, {name: value.shape for name, value in found.items()})
    assert all(torch.equal(value, expected[name]) for name, value in found.items())
    if not full:
        on_disk = weights(final)
        assert len(on_disk) == len(found) and all(value.dtype == torch.float32 for value in on_disk.values())


@pytest.mark.slow
@pytest.mark.dist
@backends_and_pefts()
def test_what_is_saved_is_what_was_trained_and_loads_without_mft(tree: Tree, backend: str, peft: str) -> None:
    compare(tree.folder(backend, f"{peft}-whole"), "step-9", full=peft == "full")


@pytest.mark.slow
@pytest.mark.dist
@pytest.mark.parametrize("backend, case", HALF)
def test_what_was_computed_in_half_precision_is_saved_as_it_was_updated(
    tree: Tree, backend: str, case: str
) -> None:
    compare(tree.folder(backend, f"{case}-half"), "step-9", full=case == "full")


def test_a_state_of_another_backend_is_taken_up(tmp_path: Path) -> None:
    engine = Single().start("fp32", cpu=True)
    module, optimizer = prepared(engine)
    train(engine, module, optimizer, range(2), 1.0)
    engine.save_state(tmp_path)
    norms, state = train(engine, module, optimizer, range(2, 4), 1.0), trained(engine)
    engine.close()
    engine = Ddp().start("fp32", cpu=True)
    module, optimizer = prepared(engine)
    assert engine.load_state(tmp_path) is False
    assert train(engine, module, optimizer, range(2, 4), 1.0) == norms
    assert all(torch.equal(value, trained(engine)[name]) for name, value in state.items())
    (tmp_path / "shard-0.safetensors").unlink()
    with pytest.raises(UserError, match=r"shard-0\.safetensors is missing"):
        engine.load_state(tmp_path)
    engine.close()


def stepped(optimizer: torch.optim.Optimizer, weight: torch.Tensor, steps: int) -> torch.Tensor:
    for _ in range(steps):
        weight.grad = weight.detach().sin()
        optimizer.step()
    return weight.detach().clone()


def dealt(weight: torch.nn.Parameter, borders: list[int]) -> list[list[Shard]]:
    """One rank's pieces for each stretch between two borders."""
    flat = weight.detach().view(-1)
    stretches = itertools.pairwise(borders)
    return [[Shard("weight", start, flat[start:end], weight, start)] for start, end in stretches]


def test_pieces_fit_any_other_division(tmp_path: Path) -> None:
    weight = torch.nn.Parameter(torch.randn(7, 3, generator=torch.Generator().manual_seed(0)))
    optimizer = torch.optim.AdamW([weight])
    stepped(optimizer, weight, 2)
    for rank, mine in enumerate(dealt(weight, [0, 5, 6, 21])):
        sharded_state.save(mine, optimizer, tmp_path, rank)
    expected = stepped(optimizer, weight, 2)

    other = torch.nn.Parameter(torch.zeros(7, 3))
    optimizer = torch.optim.AdamW([other])
    for mine in dealt(other, [0, 11, 21]):
        sharded_state.load(mine, optimizer, tmp_path, {"weight"})
    assert torch.equal(stepped(optimizer, other, 2), expected)

    (tmp_path / "shard-1.safetensors").unlink()
    with pytest.raises(UserError, match="hold 20 of the 21 elements of weight from number 0 on"):
        sharded_state.load(dealt(other, [0, 21])[0], optimizer, tmp_path, {"weight"})
    with pytest.raises(UserError, match=r"2 parameters are only in one of them, e\.g\. bias"):
        sharded_state.load([], optimizer, tmp_path, {"bias"})


def test_state_in_blocks_goes_on_only_with_the_division_that_wrote_it(tmp_path: Path) -> None:
    weight = torch.nn.Parameter(torch.randn(8, 4, generator=torch.Generator().manual_seed(0)))
    optimizer = torch.optim.Adafactor([weight], lr=0.1)  # keeps a number per row and one per column
    stepped(optimizer, weight, 2)
    sharded_state.save(dealt(weight, [0, 32])[0], optimizer, tmp_path, 0)
    expected = stepped(optimizer, weight, 2)

    other = torch.nn.Parameter(torch.zeros(8, 4))
    optimizer = torch.optim.Adafactor([other], lr=0.1)
    with pytest.raises(UserError, match="Adafactor keeps its state in blocks that cannot be resharded"):
        sharded_state.load(dealt(other, [0, 16, 32])[0], optimizer, tmp_path, {"weight"})
    sharded_state.load(dealt(other, [0, 32])[0], optimizer, tmp_path, {"weight"})
    assert torch.equal(stepped(optimizer, other, 2), expected)
