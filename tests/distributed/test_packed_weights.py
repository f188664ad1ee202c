"""Packed 4-bit weights under backends that cast weights to the run's precision: the bits stay what they are,
also as older releases of torch gather them, or the run is refused."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.distributed.fsdp._fully_shard._fsdp_param import FSDPParam

from mft.config.compose import compose_resolved
from mft.config.validate import check
from mft.distributed.fsdp import Fsdp
from mft.errors import UserError
from tests.distributed.equality import DESCENT, START, relative
from tests.distributed.ranks import run_ranks
from tests.distributed.runs import Tree, play, write_tasks
from tests.distributed.test_descent import BF16
from tests.model import quantised

QLORA = (*DESCENT, "peft=qlora", "train.precision=bf16", "train.max_steps=4")


def of_torch_2_11(self: Any, mp_policy: Any) -> None:
    """What FSDP2 casts to when it gathers a parameter, as torch 2.11 decides it: also whole numbers."""
    param_dtype, reduce_dtype = mp_policy.param_dtype, mp_policy.reduce_dtype
    self.orig_dtype = self.sharded_param.dtype
    self.reduce_dtype = None if reduce_dtype == param_dtype else reduce_dtype
    self.param_dtype = None if param_dtype == self.orig_dtype else param_dtype


def play_as_on(gather: Callable[..., None] | None, run_dirs: Sequence[Path]) -> list[str]:
    """Plays runs while FSDP2 gathers by `gather`; returns the dtypes of the weights of the last one."""
    dtypes: set[str] = set()
    own = FSDPParam.init_dtype_attrs

    def init(self: Any, mp_policy: Any) -> None:
        (gather or own)(self, mp_policy)
        dtypes.add(str(self.orig_dtype).removeprefix("torch."))

    FSDPParam.init_dtype_attrs = init  # type: ignore[method-assign]
    try:
        play(run_dirs)
    finally:
        FSDPParam.init_dtype_attrs = own  # type: ignore[method-assign]
    return sorted(dtypes)


@pytest.mark.slow
@pytest.mark.dist
class TestLosses:
    """On two ranks against one process."""

    @pytest.fixture(scope="class")
    def tree(self, tmp_path_factory: pytest.TempPathFactory) -> Tree:
        tree = Tree(tmp_path_factory.mktemp("packed"))
        run_ranks(
            1,
            play,
            [tree.frozen("single", "qlora", QLORA, 1), tree.frozen("single", "start", (*QLORA, *START), 1)],
        )
        dtypes = run_ranks(2, play_as_on, of_torch_2_11, [tree.frozen("fsdp", "bf16-2.11", QLORA)])
        assert dtypes[0] == ["bfloat16", "float32"]  # packed ones and the base's; adapters
        run_ranks(
            2, play, [tree.frozen(backend, "bf16-qlora", QLORA) for backend in ("fsdp", "zero2", "zero3")]
        )
        return tree

    @pytest.mark.parametrize(
        ("backend", "case"),
        [("fsdp", "bf16-qlora"), ("fsdp", "bf16-2.11"), ("zero2", "bf16-qlora"), ("zero3", "bf16-qlora")],
    )
    def test_are_those_of_one_process(self, tree: Tree, backend: str, case: str) -> None:
        one, start = tree.folder("single", "qlora"), tree.folder("single", "start")
        found = relative(one, tree.folder(backend, case), start)
        assert all(found[name] < bound for name, bound in BF16.items()), found


@pytest.fixture
def given(tmp_path: Path) -> list[str]:
    paths = ",".join(map(str, write_tasks(tmp_path / "tasks")))
    return [f"cache_dir={tmp_path}", f"data.paths=[{paths}]", "train.precision=bf16", "peft=qlora"]


def refusal(given: Sequence[str], *overrides: str) -> str:
    """Returns what is said to a run, "" where it may start."""
    try:
        check(compose_resolved([*given, *overrides]), world=1)
    except UserError as error:
        return str(error)
    return ""


def test_what_would_be_cast_is_refused(given: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    packed = ("model=tiny", "dist=fsdp", "peft.storage_dtype=uint8")
    assert Fsdp().casts_whole_numbers() == (torch.__version__ < "2.13") == bool(refusal(given, *packed))
    monkeypatch.setattr(FSDPParam, "init_dtype_attrs", of_torch_2_11)
    assert refusal(given, *packed).startswith("peft.storage_dtype=uint8: this dist casts weights to bf16")
    assert refusal(given, "model=tiny", "dist=fsdp") == ""
    assert refusal(given, *packed[:2], "peft.storage_dtype=uint8", "train.precision=fp32") == ""
    assert refusal(given, "model=tiny", "dist=zero3", "peft.storage_dtype=uint8") == ""


@pytest.mark.parametrize(("dist", "stored", "refused"), [
    ("zero2", "bfloat16", False),
    ("zero2", "uint8", False),
    ("zero2", "float16", True),
    ("fsdp", "float32", True),
    ("ddp", "float16", False),
])  # fmt: skip
def test_a_checkpoint_keeps_its_own_storage(
    given: list[str], tmp_path: Path, tiny_folder: Path, dist: str, stored: str, refused: bool
) -> None:
    quantised.bnb(tiny_folder, tmp_path / "base", 4, bnb_4bit_quant_storage=getattr(torch, stored))
    found = refusal(given, "model=auto", f"model.path={tmp_path / 'base'}", f"dist={dist}")
    named = {"float16": "fp16", "float32": "fp32"}.get(stored)
    assert found.startswith(f"model.path: its 4-bit weights are stored as {named}: ") == refused, found
    assert refused or found == ""
