"""The loop that one writes without this project: transformers, peft, autocast, fused AdamW, whole logits."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F

from benchmarks.gpu import models
from benchmarks.gpu.timing import Clock, number_of_steps, or_memory, summary
from mft.training.memory import PeakMemory
from tests.gpu.children import Place
from tests.model.rows import batch


class Plain:
    """A model and its optimizer."""

    def __init__(self, name: str, peft: str, place: Place):
        """peft: lora or full."""
        from peft import LoraConfig, get_peft_model
        from transformers import AutoModelForCausalLM

        self.name, self.place, self.device = name, place, torch.device(place.device)
        dtype = torch.bfloat16 if peft == "lora" else torch.float32
        base = AutoModelForCausalLM.from_pretrained(
            models.folder(name, place), dtype=dtype, attn_implementation="sdpa", device_map={"": place.device}
        )
        adapter = LoraConfig(r=16, lora_alpha=32, target_modules="all-linear", task_type="CAUSAL_LM")
        self.model: Any = get_peft_model(base, adapter) if peft == "lora" else base
        self.model.train()
        trained = [p for p in self.model.parameters() if p.requires_grad]
        self.optimizer = torch.optim.AdamW(trained, lr=1e-5, fused=True)

    def time(self, kind: str, padded: bool = False, checkpointing: bool = False) -> dict[str, Any]:
        """Returns times and peak of a step over rows P, O or M. padded: each sample is a row as long as the
        longest; otherwise restarting positions let transformers make a block mask."""
        if checkpointing:
            self.model.gradient_checkpointing_enable({"use_reentrant": False})
            self.model.enable_input_require_grads()
        else:
            self.model.gradient_checkpointing_disable()
        total, vocabulary = models.length(self.place), models.shape(self.name, self.place).vocabulary
        rows = [models.lengths(kind, total, seed) for seed in range(4)]
        batches = [
            batch(
                [[n] for n in row] if padded else [row], max(row) if padded else total, vocabulary, seed=seed
            )
            for seed, row in enumerate(rows)
        ]

        def steps() -> dict[str, float]:
            clock, memory = Clock(self.device), PeakMemory.of(self.device)
            warm_up, count = number_of_steps(self.place)
            for number in range(count):
                if number == warm_up:
                    memory.close("warming up")
                clock.mark()
                self._step(batches[number % 4], padded)
            clock.mark()
            return summary(clock, warm_up, memory, total)

        return or_memory(steps)

    def _step(self, data: Any, padded: bool) -> None:
        ids_BT, target_BT = data.ids_BT.to(self.device), data.target_BT.to(self.device)
        given: dict[str, Any] = {"position_ids": data.position_BT.to(self.device)}
        if padded:
            given["attention_mask"] = (data.sample_BT >= 0).long().to(self.device)
        with torch.autocast(self.device.type, torch.bfloat16):
            logits_BTV = self.model(input_ids=ids_BT, use_cache=False, **given).logits
        loss = F.cross_entropy(logits_BTV.float().flatten(0, 1), target_BT.flatten())
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad()
