"""Which layers the model of a run recomputes. No GPU is here: its memory is given, all else is that of a real
model."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from mft.assembly.model import checkpoint_layers
from mft.distributed.ddp import Ddp
from mft.model.peft.lora import Lora
from mft.model.tiny import Tiny
from mft.optim.optimizers import AdamW


@pytest.mark.parametrize(
    ("gib", "other", "every", "words"),
    [
        (80, 0, 0, "off; auto: about "),
        (4, 0, 1, "on; auto: about 2.2 GiB of the 2.6 GiB that a GPU has for it, without it 2.8 GiB"),
        (80, 2, 2, "one of 2 layers; of the other"),
        (4, 2, 1, "on; auto: about 2.2 GiB"),
    ],
)
def test_all_ranks_do_what_the_one_with_the_least_memory_chooses_and_say_why(
    tiny: Tiny, monkeypatch: pytest.MonkeyPatch, gib: int, other: int, every: int, words: str
) -> None:
    total = SimpleNamespace(total_memory=gib * 2**30)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: total)
    model = Lora().attach(tiny.model(torch.float32), tiny)
    engine = SimpleNamespace(
        device=torch.device("cuda", 0), world=2, gather=lambda own: [own, (other, "; of the other")]
    )
    parts = SimpleNamespace(model=tiny, peft=Lora(), optimizer=AdamW(), base_lr=1e-3, dist=Ddp())
    asked: Any = SimpleNamespace(
        engine=engine,
        parts=parts,
        settings=SimpleNamespace(precision=SimpleNamespace(value="bf16")),
        data_settings=SimpleNamespace(seq_length=4096),
    )
    loader: Any = SimpleNamespace(sizes=SimpleNamespace(per_device=64))
    chosen, told = checkpoint_layers(asked, loader, model)
    assert chosen == every and told.startswith(words)
    classes = tiny.layer_classes(model)
    layers: list[Any] = [part for part in model.modules() if type(part).__name__ in classes]
    assert [layer.gradient_checkpointing for layer in layers] == [every > 0, every == 1]
