"""Which layers the model of a run recomputes. No GPU is here: its memory is given, all else is that of a real
model."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from mft.assembly import model as assembly_model
from mft.assembly.model import checkpoint_layers
from mft.errors import UserError
from mft.plan.case import case, composed
from mft.plan.gpus import device
from mft.plan.memory import needed


def chosen(root: Path, cache_dir: Path, gib: float, others: list[Any]) -> tuple[int, str, list[bool]]:
    """Returns what a rank of two with a GPU of `gib` GiB does, the same in words, and which layers it
    recomputes."""
    given = [f"cache_dir={cache_dir}", f"output_dir={root}", "model=tiny"]
    given += ["peft=lora", "dist=ddp", "train.precision=bf16", "data=pack", "data.seq_length=4096"]
    given += ["train.per_device_batch_size=64", "model.gradient_checkpointing=auto"]
    of = case(composed(given), device(f"2x{gib}GiB"))
    model = of.parts.peft.attach(of.parts.model.model(torch.float32), of.parts.model)
    gpu = torch.device("cuda", 0)
    engine = SimpleNamespace(device=gpu, world=2, gather=lambda own: [own, *others])
    run: Any = SimpleNamespace(engine=engine, parts=of.parts, cfg=of.cfg, skeletons=of.skeletons)
    every, told = checkpoint_layers(run, model)
    classes = of.parts.model.layer_classes(model)
    layers: list[Any] = [part for part in model.modules() if type(part).__name__ in classes]
    if not others:
        assert every == needed(of).every, "not what a plan says"
    return every, told, [layer.gradient_checkpointing for layer in layers]


@pytest.fixture
def memory(monkeypatch: pytest.MonkeyPatch) -> Any:
    def give(gib: float) -> None:
        found = SimpleNamespace(total_memory=gib * 2**30, name="a GPU")
        monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: found)

    return give


@pytest.mark.parametrize(
    ("gib", "others", "every", "words"),
    [
        (80, [], 0, "off; auto: about "),
        (2.5, [], 1, "on; auto: about "),
        (80, [(2, "; of the other")], 2, "one of 2 layers; of the other"),
        (2.5, [(2, "; of the other")], 1, "on; auto: about "),
    ],
)
def test_all_ranks_do_what_the_one_with_the_least_memory_chooses_and_say_why(
    tmp_path: Path, cache_dir: Path, memory: Any, gib: float, others: list[Any], every: int, words: str
) -> None:
    memory(gib)
    found, told, layers = chosen(tmp_path, cache_dir, gib, others)
    assert found == every and told.startswith(words)
    assert layers == [every > 0, every == 1]


def test_a_model_that_cannot_be_estimated_is_decided_by_its_weights(
    tmp_path: Path, cache_dir: Path, memory: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refused(*_: object) -> None:
        raise UserError("code of the checkpoint builds the model")

    memory(80)
    monkeypatch.setattr(assembly_model, "needed", refused)
    found, told, _ = chosen(tmp_path, cache_dir, 80, [(0, "")])
    assert found == 0
    assert told == (
        "off; auto: by the number of weights, since memory is not estimated: code of the checkpoint builds the "
        "model"
    )
