"""Which configs can be planned: with a config.json alone, without tasks, for a machine that is not here."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from mft.errors import UserError
from mft.plan import gpus
from mft.plan.case import case, composed
from mft.plan.gpus import Device, device
from tests.plan.configs import config_alone
from tests.tiny_runs import write_task


@pytest.fixture
def model(tmp_path: Path) -> str:
    return f"model.path={config_alone(tmp_path / 'model')}"


def test_a_config_is_enough_and_no_task_is_needed(model: str) -> None:
    found = case(composed([model, "tracking=none"]), device("H100"))
    assert found.parts.tasks == [] and found.world == 1
    assert str(found.cfg.train.precision) == "bf16"  # of the GPU, not of this machine


def test_the_tasks_that_there_are_are_checked(model: str, tmp_path: Path) -> None:
    write_task(tmp_path / "adding", 8)
    found = case(composed([model, f"data.paths=[{tmp_path / 'adding'}]", "tracking=none"]), device("H100"))
    assert [task.name for task in found.parts.tasks] == ["adding"]
    with pytest.raises(UserError, match=r"did you mean .*adding"):
        case(composed([model, f"data.paths=[{tmp_path / 'addin'}]", "tracking=none"]), device("H100"))


@pytest.mark.parametrize(
    ("overrides", "gpu", "world"),
    [
        (["dist=ddp"], "8xH100", 8),
        (["dist=ddp", "launch.nproc=4"], "H100", 4),
        (["dist=ddp", "launch.nnodes=2", "launch.rdzv_endpoint=a:1"], "8xH100", 16),
        (["launch=inline"], "H100", 1),
        ([], "H100", 1),
    ],
)
def test_ranks_are_those_of_the_machine_that_is_planned_for(
    model: str, overrides: list[str], gpu: str, world: int
) -> None:
    assert case(composed([model, "tracking=none", *overrides]), device(gpu)).world == world


@pytest.mark.parametrize(
    ("overrides", "gpu", "words"),
    [
        ([], "2xH100", "dist=single with 2 ranks: choose dist=ddp"),
        (["dist=ddp", "train.global_batch_size=6"], "4xH100", "must be a multiple of"),
        (["launch.nproc=many"], "H100", "launch.nproc=many must be at least 1"),
        (["peft.rank=0"], "H100", "peft.rank=0 must be at least 1."),
        (["peft.rank=4096"], "H100", "have no rank above 2048"),
    ],
)
def test_what_a_run_would_refuse_is_refused(model: str, overrides: list[str], gpu: str, words: str) -> None:
    with pytest.raises(UserError) as caught:
        case(composed([model, "tracking=none", *overrides]), device(gpu))
    assert words in str(caught.value)


def test_launch_nproc_cannot_ask_for_more_gpus_than_are_visible(
    model: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two GPUs are given by the test."""
    monkeypatch.setattr("mft.launch.placement.visible_gpus", lambda: 2)
    shown = Device("NVIDIA H100", 80 * gpus.GIB, 2, visible=True)
    assert case(composed([model, "tracking=none", "dist=ddp"]), shown).world == 2
    with pytest.raises(UserError, match="every rank needs a GPU, and 2 are visible"):
        case(composed([model, "tracking=none", "dist=ddp", "launch.nproc=3"]), shown)


def test_a_hub_name_is_read_from_the_cache_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(UserError, match=r"a plan fetches nothing.*hf download owner/name config.json"):
        composed(["model.path=owner/name"])
    repository = tmp_path / "models--owner--name"
    snapshot = config_alone(repository / "snapshots" / "0123456789")
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text("0123456789")
    assert composed(["model.path=owner/name"]).model.path == str(snapshot)


def test_an_adapter_is_planned_by_its_own_config(model: str, tmp_path: Path) -> None:
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    own = {"r": 5, "target_modules": ["model.layers.0.self_attn.q_proj", "model.layers.1.self_attn.q_proj"]}
    (adapter / "adapter_config.json").write_text(json.dumps(own))
    found = case(composed([model, "tracking=none", f"peft.path={adapter}"]), device("H100"))
    assert (found.parts.peft.rank, found.parts.peft.targets) == (5, ["q_proj"])  # type: ignore[attr-defined]
    (adapter / "adapter_config.json").write_text("{}")
    with pytest.raises(UserError, match="names neither r nor target_modules"):
        composed([model, f"peft.path={adapter}"])
