"""The sentence for memory that ran out."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from omegaconf import OmegaConf

from mft.files.json_file import write_json
from mft.launch import out_of_memory
from mft.launch.out_of_memory import explain
from mft.run_folder import MICRO_BATCH

CFG = OmegaConf.create(
    {
        "train": {"per_device_batch_size": 8, "per_device_eval_batch_size": 16},
        "data": {"seq_length": 4096},
        "model": {"gradient_checkpointing": "true"},
        "peft": {"_target_": "mft.model.peft.qlora.QLora"},
        "dist": {"_target_": "mft.distributed.ddp.Single"},
    }
)


def from_the_allocator() -> RuntimeError:
    try:
        torch.empty(2**60)
    except RuntimeError as error:
        return error
    raise AssertionError("a machine with an exbibyte")


@pytest.mark.parametrize(
    "error",
    [
        MemoryError(),
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB"),
        from_the_allocator(),
    ],
)
def test_every_kind_is_recognised_also_as_a_cause(error: Exception) -> None:
    outer = ValueError("while saving")
    outer.__cause__ = error
    assert explain(error, CFG, Path()) is not None and explain(outer, CFG, Path()) is not None


def test_settings_are_named_with_their_values_and_what_is_chosen_already_is_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also the plan of the run, by what is recorded of it, for the kind of device that the test gives."""
    record = {"overrides": ["model.path=a b", "train.resume=auto"], "folder": "/work", "search": ["/mine"]}
    (tmp_path / "overrides.json").write_text(json.dumps(record))
    monkeypatch.setattr(out_of_memory, "has_gpu", lambda: False)
    sentence = str(explain(MemoryError("no room"), CFG, tmp_path))
    assert sentence == (
        "Memory ran out (no room). Lower train.per_device_batch_size (now 8), "
        "train.per_device_eval_batch_size "
        "(now 16) or data.seq_length (now 4096); or set dist=zero3 (now single). "
        "What each of them saves: cd /work && mft plan --config-dir /mine 'model.path=a b' plan.gpu=cpu"
    )
    monkeypatch.setattr(out_of_memory, "has_gpu", lambda: True)
    assert str(explain(MemoryError("no room"), CFG, tmp_path)).endswith("/mine 'model.path=a b'")


def test_other_errors_stay_what_they_are() -> None:
    assert explain(RuntimeError("shapes do not match"), CFG, Path()) is None


@pytest.mark.parametrize(("setting", "named"), [(1, False), ("true", False), (2, True), ("auto", True)])
def test_checkpointing_is_named_unless_all_layers_are_recomputed(setting: object, named: bool) -> None:
    cfg = OmegaConf.merge(CFG, {"model": {"gradient_checkpointing": setting}})
    sentence = str(explain(MemoryError(), cfg, Path()))  # type: ignore[arg-type]
    assert (f"model.gradient_checkpointing=true (now {setting})" in sentence) == named
    assert named or "gradient_checkpointing" not in sentence


def test_a_size_that_was_found_is_named(tmp_path: Path) -> None:
    write_json(tmp_path / MICRO_BATCH, {"per_device_batch_size": 32})
    own = {"train": {"per_device_batch_size": "auto"}}
    sentence = str(explain(MemoryError(), OmegaConf.merge(CFG, own), tmp_path))  # type: ignore[arg-type]
    assert "Lower train.per_device_batch_size (now auto, which found 32), " in sentence
