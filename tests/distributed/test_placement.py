"""Where a rank puts the weights that it loads. A CPU has no other device: an engine is given one by the test, and
what would go there is seen in what transformers, bitsandbytes and DeepSpeed are handed."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from omegaconf import OmegaConf

from mft.assembly.model import load_model
from mft.distributed.ddp import Ddp, Single
from mft.distributed.deepspeed import Zero2, Zero3
from mft.distributed.engine import Engine
from mft.distributed.fsdp import Fsdp
from mft.model.peft.full import Full
from mft.model.peft.lora import Lora
from mft.model.peft.qlora import QLora
from mft.model.tiny import Tiny
from mft.model.token_loss import TokenLoss
from mft.training.settings import Precision, TrainSettings
from tests.distributed.ranks import run_ranks

pytestmark = pytest.mark.slow

DEVICE = torch.device("cuda:1")
BACKENDS = {
    "single": Single(),
    "ddp": Ddp(),
    "zero2": Zero2(),
    "zero3": Zero3(persistence_threshold=0),
    "fsdp": Fsdp(),
}


@pytest.fixture
def engine(request: pytest.FixtureRequest) -> Iterator[Engine]:
    engine = BACKENDS[request.param].start("bf16", cpu=True)
    yield engine
    engine.close()


class HandedOver(Exception):
    """Ends a loading where transformers would begin it."""


def loaded(engine: Engine, name: str, peft: Full, family: Tiny) -> Any:
    """Returns the model as a run loads it."""
    parts = SimpleNamespace(model=family, peft=peft, dist=BACKENDS[name])
    settings = TrainSettings(precision=Precision.bf16)
    cfg, folder = OmegaConf.create(), Path("/nowhere")
    run: Any = SimpleNamespace(
        cfg=cfg, folder=folder, parts=parts, settings=settings, engine=engine, first_here=False
    )
    return load_model(run)


@pytest.mark.parametrize(
    ("engine", "peft", "device", "storage"),
    [
        ("single", Full(), DEVICE, None),
        ("single", QLora(), DEVICE, torch.uint8),
        ("ddp", Lora(), DEVICE, None),
        ("zero2", Full(), DEVICE, None),
        ("zero2", QLora(), DEVICE, torch.bfloat16),
        ("zero3", Full(), None, None),
        ("zero3", QLora(), torch.device("cpu"), torch.bfloat16),
        ("fsdp", Lora(), None, None),
        ("fsdp", QLora(), torch.device("cpu"), torch.bfloat16),
    ],
    indirect=["engine"],
)
def test_what_is_divided_is_read_into_the_cpus_memory_and_all_else_onto_the_device(
    engine: Engine,
    peft: Full,
    device: torch.device | None,
    storage: torch.dtype | None,
    tiny: Tiny,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from transformers import AutoModelForCausalLM
    from transformers.integrations import is_deepspeed_zero3_enabled, is_fsdp_enabled

    handed: dict[str, Any] = {}

    def from_pretrained(*names: str, **arguments: Any) -> None:
        divides = is_deepspeed_zero3_enabled() or is_fsdp_enabled()
        handed.update(arguments, divides=divides)
        raise HandedOver

    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", from_pretrained)
    engine.device = DEVICE
    with pytest.raises(HandedOver):
        loaded(engine, engine.name, peft, tiny)
    assert handed.get("device_map") == ({"": device} if device else None)
    assert handed["divides"] == (device is None)
    quantised = handed.get("quantization_config")
    assert (quantised.bnb_4bit_quant_storage if quantised else None) == storage


def inline(family: Tiny) -> tuple[int, ...]:
    """Returns what shape of a weight ZeRO-3 has left on a rank that no launcher gave a LOCAL_RANK."""
    for name in ("WORLD_SIZE", "LOCAL_RANK"):  # launch=inline has none of a launcher's variables
        os.environ.pop(name)
    engine = BACKENDS["zero3"].start("bf16", cpu=True)
    model = loaded(engine, "zero3", Full(), family)
    engine.close()
    return tuple(model.get_input_embeddings().weight.shape)


@pytest.mark.dist
def test_zero3_divides_while_it_loads_also_without_a_launcher(tiny: Tiny) -> None:
    assert run_ranks(1, inline, tiny) == [(0,)]


def packed(name: str, family: Tiny) -> dict[str, Any]:
    """Returns what was not divided yet when DeepSpeed's module was moved, and where the scales went, of a packed
    model that is prepared on this rank."""
    from bitsandbytes.functional import QuantState

    found: dict[str, Any] = {"whole": []}
    moved: dict[int, Any] = {}
    to = TokenLoss.to

    def spied(self: TokenLoss, *arguments: Any) -> TokenLoss:
        found["whole"].append([n for n, p in self.named_parameters() if not hasattr(p, "ds_id") or p.numel()])
        return to(self, *arguments)

    engine = BACKENDS[name].start("bf16", cpu=True)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(TokenLoss, "to", spied)
        patch.setattr(QuantState, "to", lambda self, device: moved.update({id(self): device}))
        module = TokenLoss(loaded(engine, name, QLora(), family), family)
        engine.prepare(module, torch.optim.AdamW([p for p in module.parameters() if p.requires_grad]))
    scales = [part.quant_state for part in module.modules() if getattr(part, "quant_state", None)]
    found["moved"] = [moved.get(id(state)) == engine.device for state in scales]
    engine.close()
    return found


@pytest.mark.dist
@pytest.mark.parametrize("name", ["zero3", "fsdp"])
def test_packed_weights_are_divided_before_they_move_and_their_scales_follow(name: str, tiny: Tiny) -> None:
    (found,) = run_ranks(1, packed, name, tiny)
    assert found["whole"] == ([[]] if name == "zero3" else [])
    assert found["moved"] == [True] * 7 * tiny.layers
