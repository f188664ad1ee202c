"""The table of sizes in docs/plan.md: what common models need on common GPUs, by `mft plan`.

    python -m benchmarks.sizes

Made from the shapes below alone: no weights, no GPU, and no network. Rows of 4,096 tokens, one in a
micro-batch, 64 in a step, AdamW, bf16, recomputation as model.gradient_checkpointing=auto has it.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from mft.estimate.memory import size_words
from mft.hardware import quiet_libraries
from mft.plan.answer import Outcome, answer
from mft.plan.gpus import device
from mft.plan.report import duration

LLAMA = {"num_attention_heads": 64, "num_key_value_heads": 8, "hidden_size": 8192}
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "Qwen2.5-7B": (
        "Qwen2Config",
        {"vocab_size": 152064, "hidden_size": 3584, "intermediate_size": 18944, "num_hidden_layers": 28}
        | {"num_attention_heads": 28, "num_key_value_heads": 4, "tie_word_embeddings": False},
    ),
    "CodeLlama-34B": (
        "LlamaConfig",
        LLAMA | {"vocab_size": 32000, "intermediate_size": 22016, "num_hidden_layers": 48},
    ),
    "Llama-3.1-70B": (
        "LlamaConfig",
        LLAMA | {"vocab_size": 128256, "intermediate_size": 28672, "num_hidden_layers": 80},
    ),
    "Mixtral-8x7B": (
        "MixtralConfig",
        {"vocab_size": 32000, "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32}
        | {"num_attention_heads": 32, "num_key_value_heads": 8, "num_local_experts": 8}
        | {"num_experts_per_tok": 2},
    ),
}
"""Name → class of transformers' config, and the shapes of the released model."""

ASSUMED = ("data.seq_length=4096", "train.per_device_batch_size=1", "train.global_batch_size=64")
GPU_24, GPU_80 = "4090", "A100-80"


class Row(NamedTuple):
    """A model, its settings, and the GPUs that it is planned for."""

    model: str
    overrides: tuple[str, ...]
    gpus: tuple[str, ...]


ROWS = (
    Row("Qwen2.5-7B", ("peft=lora",), (GPU_24, GPU_80)),
    Row("Qwen2.5-7B", ("peft=qlora",), (GPU_24, GPU_80)),
    Row("Qwen2.5-7B", ("peft=full", "dist=fsdp"), (f"8x{GPU_80}",)),
    Row("Qwen2.5-7B", ("peft=full", "dist=zero3"), (f"8x{GPU_80}",)),
    Row("CodeLlama-34B", ("peft=qlora",), (GPU_80,)),
    Row("CodeLlama-34B", ("peft=qlora", "dist=zero2"), (f"2x{GPU_80}", f"4x{GPU_80}")),
    Row("Llama-3.1-70B", ("peft=qlora",), (GPU_80,)),
    Row("Llama-3.1-70B", ("peft=qlora", "dist=zero2"), (f"2x{GPU_80}", f"4x{GPU_80}")),
    Row("Llama-3.1-70B", ("peft=qlora", "dist=fsdp"), (f"2x{GPU_80}", f"4x{GPU_80}")),
    Row("Llama-3.1-70B", ("peft=qlora", "dist=zero3"), (f"2x{GPU_80}", f"4x{GPU_80}")),
    Row("Mixtral-8x7B", ("peft=lora", "dist=fsdp"), (f"2x{GPU_80}", f"4x{GPU_80}", f"8x{GPU_80}")),
    Row("Mixtral-8x7B", ("peft=qlora", "dist=fsdp"), (f"2x{GPU_80}", f"4x{GPU_80}")),
)

PRESETS = (
    Row("Qwen2.5-7B", ("experiment=full_fsdp",), (f"8x{GPU_80}", "8x24GiB")),
    Row(
        "Qwen2.5-7B",
        ("experiment=full_fsdp", "dist.reduce_every_micro_batch=true"),
        (f"8x{GPU_80}", "8x24GiB"),
    ),
    Row("Qwen2.5-7B", ("experiment=full_zero3",), (f"8x{GPU_80}", "8x24GiB")),
    Row("Qwen2.5-7B", ("experiment=lora_zero2",), ("8x24GiB",)),
    Row("CodeLlama-34B", ("experiment=qlora_zero2",), (f"4x{GPU_80}", "4x40GiB")),
    Row("Llama-3.1-70B", ("experiment=qlora_zero2",), (f"4x{GPU_80}",)),
    Row("Llama-3.1-70B", ("experiment=qlora_zero3",), (f"4x{GPU_80}", "8x24GiB")),
    Row("Llama-3.1-70B", ("experiment=qlora_fsdp",), (f"4x{GPU_80}", "8x24GiB")),
)
"""Numbers for the comments of conf/experiment, at their own settings."""


def write_config(model: str, folder: Path) -> Path:
    """Writes the config.json of a model into a folder; returns the folder."""
    import transformers

    name, shapes = MODELS[model]
    config = getattr(transformers, name)(**shapes)
    config.architectures = [name.replace("Config", "ForCausalLM")]
    config.save_pretrained(str(folder / model))
    return folder / model


def lines(rows: tuple[Row, ...], assumed: tuple[str, ...], folder: Path) -> Iterator[str]:
    """Yields the lines of a table in Markdown."""
    yield "| model | settings | GPUs | a rank needs | recomputed | a step | else the first that fits |"
    yield "|--|--|--|--|--|--|--|"
    for row in rows:
        overrides = [f"model.path={write_config(row.model, folder)}", *assumed, *row.overrides]
        planned = answer([*overrides, "tracking=none"], [device(name) for name in row.gpus], asked=True)
        for outcome in planned.outcomes:
            yield line(row, outcome)


def line(row: Row, outcome: Outcome) -> str:
    """Returns the line of a model on a kind of GPU."""
    plan = outcome.plan
    fits = "" if plan.fits else ", does not fit"
    needed = f"{size_words(plan.peak)} of {size_words(plan.room)}{fits}"
    best = next((advice for advice in outcome.advice or () if advice.plan.fits), None)
    if best:
        change = f"`{' '.join(best.overrides)}`: {size_words(best.plan.peak)}, x {best.slower(plan):.2f}"
    else:
        change = "–" if plan.fits else "nothing"
    recomputed = {0: "none", 1: "all"}.get(plan.every, f"1 of {plan.every}")
    seconds = "–" if outcome.seconds is None else duration(outcome.seconds)
    cells = [row.model, f"`{' '.join(row.overrides)}`", plan.case.device.shown, needed, recomputed, seconds]
    return f"| {' | '.join([*cells, change])} |"


def main() -> None:
    quiet_libraries()
    with tempfile.TemporaryDirectory() as folder:
        for rows, assumed in ((ROWS, ASSUMED), (PRESETS, ("data.seq_length=4096",))):
            for text in lines(rows, assumed, Path(folder)):
                print(text, flush=True)
            print()


if __name__ == "__main__":
    main()
