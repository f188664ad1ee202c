"""Models whose adapters matter, and what they say, for the tests of the model floor."""

from __future__ import annotations

import torch

from mft.batch import Batch
from mft.model.causal_lm import CausalLM
from mft.model.peft.full import Full
from mft.model.token_loss import TokenLoss
from tests.model.rows import inputs


def logits(model: torch.nn.Module, ids_BT: torch.Tensor) -> torch.Tensor:
    model.eval()
    with torch.no_grad():
        return model(input_ids=ids_BT, use_cache=False).logits.float()


def trained(peft: Full, family: CausalLM, data: Batch, steps: int = 3) -> TokenLoss:
    """Really trained for a few steps."""
    torch.manual_seed(0)
    model = peft.attach(family.model(torch.float32, peft.quantization(torch.float32)), family)
    module = TokenLoss(model, family)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    for _ in range(steps):
        module(*inputs(data))[0].sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    return module


def shaken(model: torch.nn.Module) -> torch.nn.Module:
    """Gives fresh adapters a B that is not zero, as if they had been trained."""
    torch.manual_seed(1)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.05)
    return model
