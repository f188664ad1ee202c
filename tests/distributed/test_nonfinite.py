"""A sample without a finite loss that one of two ranks holds: both pass over the step, or both end with its
name."""

from __future__ import annotations

from pathlib import Path

import pytest

from mft.errors import UserError
from mft.files.json_file import read_json
from tests.distributed.equality import differences
from tests.distributed.ranks import run_ranks
from tests.distributed.runs import BACKENDS, FORCED, frozen, logged, play
from tests.selection import long
from tests.training.test_loop import odd_task, poisoned_model, settings

pytestmark = [pytest.mark.slow, pytest.mark.dist]


def refused(run_dir: Path) -> str:
    """Returns what a rank is told."""
    with pytest.raises(UserError) as told:
        play([run_dir])
    return str(told.value)


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder in which the runs that pass over three steps have run."""
    root = tmp_path_factory.mktemp("nonfinite")
    model, task = poisoned_model(root / "model"), odd_task(root / "odd")
    for backend in ("single", *BACKENDS):
        ranks = 1 if backend == "single" else 2
        given = [
            f"cache_dir={root / 'cache'}",
            *settings(model, task),
            f"dist={backend}",
            f"launch.nproc={ranks}",
        ]
        given += ["train.per_device_batch_size=1", "train.global_batch_size=2", *FORCED.get(backend, [])]
        given += ["train.eval_every=null", "train.eval_at_start=false", "peft=lora"]
        for allowed in (1, 3):
            frozen(root / f"{backend}-{allowed}", [*given, f"train.skip_nonfinite_steps={allowed}"])
    run_ranks(1, play, [root / "single-3"])
    run_ranks(2, play, [root / f"{backend}-3" for backend in BACKENDS])
    return root


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_step_is_passed_over_on_both_ranks(root: Path, backend: str) -> None:
    one, two = root / "single-3", root / f"{backend}-3"
    assert read_json(two / "summary.json")["skipped_steps"] == 3
    losses = logged(two, "train/loss")
    assert losses.count(None) == 3  # type: ignore[arg-type]
    assert losses == [
        loss if loss is None else pytest.approx(loss, abs=1e-5) for loss in logged(one, "train/loss")
    ]
    assert differences(one, two, series=())["weights"] < 1e-5


@pytest.mark.parametrize("backend", [long("ddp"), long("zero2"), "zero3", "fsdp"])
def test_both_ranks_are_told_the_sample_that_one_of_them_holds(root: Path, backend: str) -> None:
    first, second = run_ranks(2, refused, root / f"{backend}-1")
    assert first == second
    assert "task odd, " in first and any(f"rows.jsonl:{line}" in first for line in (5, 12, 17))
