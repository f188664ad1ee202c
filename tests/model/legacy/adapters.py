"""An adapter on an original checkpoint, as training would leave it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from mft.model.export import save_final
from mft.model.peft.lora import Lora
from mft.model.token_loss import TokenLoss


def saved_adapter(family: Any, tokenizer: Any, folder: Path) -> Any:
    """Saves an adapter that changes the model's output; returns the model with it."""
    model = Lora(rank=4).attach(family.model(torch.float32), family)
    torch.manual_seed(0)
    for key, parameter in model.named_parameters():
        if "lora_B" in key:
            torch.nn.init.normal_(parameter, std=0.05)
    save_final(TokenLoss(model, family), tokenizer, folder)
    return model
