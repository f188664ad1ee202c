"""What all lanes compute: the settings, the rows of each step, and the least work that training on them needs."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

IGNORE = -100


@dataclass(frozen=True)
class Setting:
    """A way to train, and what is aimed at."""

    title: str
    seq_length: int = 1024
    rank: int | None = 16
    checkpointing: bool = False
    speed: dict[str, float] = field(default_factory=dict)
    """Lane → how many times as fast as it this project is to be."""
    memory: dict[str, float] = field(default_factory=dict)
    """Lane → the part of its step memory that this project is to need at most."""
    peak: float | None = None
    """The part of the rate of matrix products that this project is to reach."""

    def overrides(self, steps: int) -> list[str]:
        """Returns the command line of this project: its defaults, but for what is compared and not a step's."""
        compared = [
            f"peft={'lora' if self.rank else 'full'}",
            *([f"peft.rank={self.rank}", f"peft.alpha={2 * self.rank}"] if self.rank else []),
            f"data.seq_length={self.seq_length}",
            *(["model.gradient_checkpointing=true"] if self.checkpointing else []),
            "train.per_device_batch_size=1",
            "train.precision=bf16",
            "loss=token_mean",
            "optimizer.lr=1e-5",
        ]
        around = [
            f"train.max_steps={steps + 1}",
            "train.log_every=1",
            "train.eval_at_start=false",
            "train.eval_every=null",
            "train.save_every=null",
            "train.prompts=null",
            "tracking=none",
        ]
        return ["experiment=demo", *compared, *around]


SETTINGS = {
    "lora": Setting(
        "LoRA r=16, rows of 1,024", speed={"TRL": 2.4, "LLaMA-Factory": 1.8}, memory={"TRL": 0.45}, peak=0.4
    ),
    "checkpointing": Setting(
        "LoRA r=16, rows of 1,024, gradient checkpointing", checkpointing=True, memory={"TRL": 0.3}
    ),
    "lora-512": Setting("LoRA r=16, rows of 512", seq_length=512),
    "lora-4096": Setting("LoRA r=16, rows of 4,096", seq_length=4096),
    "full": Setting("full, rows of 1,024", rank=None, speed={"TRL": 2.05}, peak=0.4),
}


@dataclass(frozen=True)
class Row:
    """A packed row: the samples of one step, one after the other."""

    ids: list[int]
    labels: list[int]
    """The ids where a token carries loss, IGNORE elsewhere; not shifted."""
    lengths: list[int]
    """Tokens of each sample."""

    @property
    def trained(self) -> int:
        """Tokens that carry loss."""
        return len(self.labels) - self.labels.count(IGNORE)


def checked_job(overrides: Sequence[str]) -> Any:
    """Returns the checked job of a command line."""
    from mft.config.compose import compose_resolved
    from mft.launch import job

    return job.checked(compose_resolved(list(overrides)), list(overrides), starts=False)


def rows(overrides: Sequence[str], steps: int) -> tuple[list[Row], Path]:
    """Returns the rows that a run of these overrides takes in its first steps, one in each, and its model."""
    from mft.assembly.start import read_data
    from mft.config import build, schema
    from mft.data.loader import BatchLoader

    cfg = schema.typed(checked_job(overrides).cfg)
    parts, (train, settings) = build.build_components(cfg), schema.settings_of(cfg)
    data = read_data(cfg, parts, settings)
    sizes, shares = schema.batch_sizes(train, 1), [task.share for task in data.tasks]
    pad_id: Any = data.tokenizer.pad_token_id
    loader = BatchLoader(data.stores, parts.rows, sizes, 0, pad_id, train, settings, shares)
    found = []
    for step in loader.steps(0, 0, steps):
        (batch,) = step.batches
        (ids,), (target,) = batch.ids_BT.tolist(), batch.target_BT.tolist()
        found.append(Row(ids, [IGNORE, *target[:-1]], batch.layout.lengths))
    return found, Path(parts.model.source())


def write(found: Sequence[Row], path: Path) -> None:
    """Writes rows for the lanes of the peers, a line each."""
    path.write_text("".join(json.dumps(vars(row)) + "\n" for row in found), encoding="utf-8")


def read(path: str) -> list[Row]:
    """Inverse of `write`."""
    return [Row(**json.loads(line)) for line in Path(path).read_text(encoding="utf-8").splitlines()]


def necessary_flops(row: Row, model: dict[str, Any], rank: int | None) -> float:
    """Returns the least work of a training step on a row.

    2 FLOPs forward and 2 back for each weight of a layer and token, 2 more where it is trained; the head at
    tokens with loss alone; the two products of attention inside each sample, below the diagonal, and twice as
    much backward. model: config.json of a llama with tied embeddings; rank: of LoRA on all linear layers,
    None: all weights are trained.
    """
    hidden, heads, layers = model["hidden_size"], model["num_attention_heads"], model["num_hidden_layers"]
    width = model.get("head_dim") or hidden // heads
    queries, keys, inner = heads * width, model["num_key_value_heads"] * width, model["intermediate_size"]
    linear = [(hidden, queries), (hidden, keys), (hidden, keys), (queries, hidden)]
    linear += [(hidden, inner), (hidden, inner), (inner, hidden)]
    weights = layers * sum(a * b for a, b in linear)
    head, tokens = hidden * model["vocab_size"], len(row.ids)
    pairs = sum(length * (length + 1) / 2 for length in row.lengths)
    attention = layers * 3 * 4 * queries * pairs
    if rank is None:
        return 6.0 * weights * tokens + 6.0 * head * row.trained + attention
    adapters = layers * sum(rank * (a + b) for a, b in linear)
    return (4.0 * weights + 6.0 * adapters) * tokens + 4.0 * head * row.trained + attention
