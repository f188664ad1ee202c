"""Every training argument of MFTCoder has a place here, and what is set there reaches the object that uses
it."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

from mft.config.build import build
from mft.config.compose import compose_resolved
from mft.data.template_choice import named

PAGE = Path(__file__).parent.parent / "docs" / "migrating.md"
# fmt: off
SEED_ARGUMENTS = [
    "load_raw_dataset", "data_paths", "output_dir", "tb_dir", "model_type", "attn_implementation", "peft_type",
    "lora_rank", "lora_alpha", "lora_dropout", "target_modules", "quantization", "pretrained_model_path",
    "weighted_loss_mode", "padding_mode", "num_train_epochs", "per_device_train_batch_size",
    "per_device_eval_batch_size", "gradient_accumulation_steps", "learning_rate", "min_lr", "seq_length",
    "log_interval", "checkpointing_steps", "evaluation_steps", "early_stopping", "early_stopping_stall_num",
    "lr_scheduler_type", "num_warmup_steps", "seed", "saving_limit", "role_markers",
]
# fmt: on

# argument -> (what the built object must hold, a way to it); `get("peft.rank")` builds `peft` and reads
# `rank`
EXPECTED: dict[str, tuple[str, Any]] = {
    "data_paths": (
        "data.paths",
        [str(Path("data/completion").absolute()), str(Path("data/docs").absolute())],
    ),
    "data_split": ("data.split", [98, 2, 0]),
    "task_weights": ("task.docstring.weight", 2),
    "output_dir": ("output_dir", str(Path("runs/first").absolute())),
    "tb_dir": ("tracking.tensorboard.dir", "tb"),
    "model_type": ("model.path", "HuggingFaceTB/SmolLM2-135M-Instruct"),
    "pretrained_model_path": ("model.path", "owner/name"),
    "attn_implementation": ("model.attention", "eager"),
    "peft_type": ("peft", "Lora"),
    "quantization": ("peft", "QLora"),
    "lora_rank": ("peft.rank", 96),
    "lora_alpha": ("peft.alpha", 32),
    "lora_dropout": ("peft.dropout", 0.05),
    "target_modules": ("peft.targets", ["q_proj", "v_proj"]),
    "weighted_loss_mode": ("loss", "TaskTokenMean"),
    "tokenize_mode": ("data.rows", "Concat"),
    "padding_mode": ("data.rows.pad_to", "seq_length"),
    "num_train_epochs": ("train.epochs", 4),
    "max_train_steps": ("train.max_steps", 1000),
    "per_device_train_batch_size": ("train.per_device_batch_size", 8),
    "per_device_eval_batch_size": ("train.per_device_eval_batch_size", 16),
    "gradient_accumulation_steps": ("train.gradient_accumulation_steps", 4),
    "learning_rate": ("optimizer.lr", 2e-4),
    "min_lr": ("scheduler.min_lr", 1e-5),
    "weight_decay": ("optimizer.weight_decay", 0.1),
    "lr_scheduler_type": ("scheduler", "Linear"),
    "num_warmup_steps": ("scheduler.warmup", 300),
    "seq_length": ("data.seq_length", 2048),
    "log_interval": ("train.log_every", 5),
    "checkpointing_steps": ("train.save_every", 200),
    "evaluation_steps": ("train.eval_every", 200),
    "early_stopping": ("train.early_stopping", True),
    "early_stopping_stall_num": ("train.early_stopping_stall_num", 5),
    "saving_limit": ("train.keep", 2),
    "seed": ("train.seed", 1234),
    "resume_from_checkpoint": ("train.resume", "never"),
    "role_markers": ("role_markers", "### Response:\n"),
    "--distributed_type": ("dist", "Ddp"),
    "trust_remote_code": ("model.trust_remote_code", True),
}
COMPONENTS = (
    *("model", "peft", "dist", "loss", "optimizer", "scheduler"),
    *("data.rows", "task.docstring", "tracking.tensorboard"),
)


def table() -> dict[str, str]:
    """Returns argument -> override of the page's first table."""
    section = PAGE.read_text().split("## Other scripts")[0]
    rows = re.findall(r"^\| `([^`]+)`[^|]*\| (.+?) \|", section, re.M)
    return {argument: override.strip("`") for argument, override in rows}


def split(override: str) -> list[str]:
    """Overrides are separated by blanks, except inside braces."""
    return re.findall(r"(?:[^\s{]|\{[^}]*\})+", override)


def test_every_argument_of_the_predecessor_has_its_row_and_every_row_its_test() -> None:
    rows = table()
    assert not [argument for argument in SEED_ARGUMENTS if argument not in rows]
    assert set(rows) - set(EXPECTED) == {"load_raw_dataset"}


@pytest.mark.parametrize("argument", EXPECTED)
def test_its_value_reaches_the_object_that_uses_it(argument: str) -> None:
    overrides = split(table()[argument])
    place, expected = EXPECTED[argument]
    needed = ["task=[docstring]"] if place.startswith("task.") else []
    if not any(o.startswith(("model=", "model.path=")) for o in overrides):
        needed.append("model.path=owner/name")
    cfg = compose_resolved([*needed, *overrides])
    if place == "role_markers":
        assert named(cfg.data.template, cfg.data.role_markers).markers["assistant"] == expected
        return
    component = next((c for c in COMPONENTS if place == c or place.startswith(c + ".")), None)
    if component is None:
        found: Any = cfg
        for part in place.split("."):
            found = found[part]
    else:
        node = cfg
        for part in component.split("."):
            node = node[part]
        built = build(node, component)
        found = (
            type(built).__name__
            if place == component
            else getattr(built, place.removeprefix(component + "."))
        )
    assert found == expected
