"""The lanes of the peers' environments, on rows that are tokenised and packed already.

    python -m benchmarks.peers.peer_lane (trl | llamafactory) SPEC.json

Both get the rows in the form in which their own packing leaves them, in the order of the file.
"""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from datasets import Dataset, DatasetDict
from transformers import TrainerCallback

from benchmarks.peers.turns import Turns
from benchmarks.peers.work import IGNORE, Row, read


@dataclass(frozen=True)
class Spec:
    """What a peer trains."""

    model: str
    """Folder of the model."""
    rows: str
    """File of the rows, see `work.write`."""
    folder: str
    """An empty one for what the peer writes."""
    seq_length: int
    rank: int | None
    """Of LoRA on all linear layers; None: all weights are trained."""
    dtype: str
    """Of the weights as they are loaded: bfloat16 or float32. TRL alone asks for it."""
    checkpointing: bool

    @property
    def training(self) -> dict[str, Any]:
        """Arguments of transformers' trainer, which both peers extend."""
        return {
            "output_dir": self.folder,
            "per_device_train_batch_size": 1,
            "max_steps": len(read(self.rows)) + 1,
            "learning_rate": 1e-5,
            "bf16": True,
            "use_cpu": True,
            "logging_steps": 1,
            "save_strategy": "no",
            "report_to": "none",
            "disable_tqdm": True,
        }


class Steps(TrainerCallback):
    """Takes the turns of a transformers trainer: from one logged step to the next. Raises ValueError where the
    model is given another row than this project's run has."""

    def __init__(self, rows: list[Row]):
        self.rows, self.number, self.turns = rows, 0, Turns()
        self.seen: dict[str, int] = {}

    def on_train_begin(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        torch.set_num_threads(1)
        model.register_forward_pre_hook(self._look, with_kwargs=True)
        trained = [p for p in model.parameters() if p.requires_grad]
        dtypes = sorted({str(p.dtype).removeprefix("torch.") for p in trained})
        self.turns.step_done(trained=sum(p.numel() for p in trained), dtypes=dtypes)

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        self.turns.step_done(loss=logs["loss"], **self.seen)

    def _look(self, model: Any, args: Any, kwargs: dict[str, Any]) -> None:
        row = self.rows[self.number]
        ids, labels = kwargs["input_ids"].flatten().tolist(), kwargs["labels"].flatten().tolist()
        used = slice(len(row.ids))
        if ids[used] != row.ids or labels[used] != row.labels or {*labels[len(row.ids) :]} - {IGNORE}:
            raise ValueError(f"the model is given another row in step {self.number + 1}")
        self.seen = {"tokens": len(row.ids), "with_loss": len(labels) - labels.count(IGNORE)}
        self.number += 1


def trl(spec: Spec, rows: list[Row], steps: Steps) -> None:
    """SFTTrainer with padding_free: rows as `packing` makes them, whose samples restart the positions."""
    from peft import LoraConfig
    from trl import SFTConfig, SFTTrainer

    columns = {"input_ids": "ids", "labels": "labels", "seq_lengths": "lengths"}
    adapters = {"target_modules": "all-linear", "task_type": "CAUSAL_LM", "lora_dropout": 0.0}
    trainer = SFTTrainer(
        model=spec.model,
        args=SFTConfig(
            **spec.training,
            padding_free=True,
            max_length=None,
            gradient_checkpointing=spec.checkpointing,
            model_init_kwargs={"dtype": spec.dtype},
        ),
        train_dataset=Dataset.from_list(
            [{key: getattr(row, of) for key, of in columns.items()} for row in rows]
        ),
        peft_config=LoraConfig(r=spec.rank, lora_alpha=2 * spec.rank, **adapters) if spec.rank else None,
        callbacks=[steps],
    )
    trainer._get_train_sampler = lambda *given: torch.utils.data.SequentialSampler(trainer.train_dataset)
    trainer.train()


def llamafactory(spec: Spec, rows: list[Row], steps: Steps) -> None:
    """`llamafactory-cli train` with neat_packing, from a tokenised data set as it saves them."""
    # it imports torchaudio, which text does not need, and whose wheels need CUDA
    sys.modules["torchaudio"] = audio = ModuleType("torchaudio")
    audio.__spec__ = ModuleSpec("torchaudio", None)
    from llamafactory.train.tuner import run_exp
    from transformers import AutoTokenizer

    tokenized, pad_id = f"{spec.folder}/tokenized", AutoTokenizer.from_pretrained(spec.model).pad_token_id
    # its collator pads to a multiple of 8, but for the positions, and fails where that is more than it has
    cutoff = spec.seq_length + 7
    packed = [as_neat_packing(row, cutoff + 1, pad_id) for row in rows]
    DatasetDict({"train": Dataset.from_list(packed)}).save_to_disk(tokenized)
    adapters = {"lora_rank": spec.rank, "lora_target": "all"} if spec.rank else {}
    arguments = {
        "stage": "sft",
        "do_train": True,
        "model_name_or_path": spec.model,
        "dataset": "tokenised already",
        "template": "default",
        "tokenized_path": tokenized,
        "cutoff_len": cutoff,
        "neat_packing": True,
        "finetuning_type": "lora" if spec.rank else "full",
        "disable_gradient_checkpointing": not spec.checkpointing,
        "disable_shuffling": True,
        "overwrite_output_dir": True,
    }
    run_exp(arguments | adapters | spec.training, [steps])


def as_neat_packing(row: Row, width: int, pad_id: int) -> dict[str, Any]:
    """Returns a row as LLaMA-Factory's PackedSupervisedDatasetProcessor writes it."""
    free = width - len(row.ids)
    numbers = [number for number, length in enumerate(row.lengths, start=1) for _ in range(length)]
    borders = [0]
    for length in [*row.lengths, free]:
        borders.append(borders[-1] + length)
    absent = [2**32]
    return {
        "input_ids": row.ids + [pad_id] * free,
        "attention_mask": numbers + [0] * free,
        "position_ids": [position for length in row.lengths for position in range(length)] + [0] * free,
        "labels": row.labels + [IGNORE] * free,
        "images": None,
        "videos": None,
        "audios": None,
        "packing_params": {
            "sequence_boundaries": borders,
            "image_subseq_ids": absent,
            "video_subseq_ids": absent,
            "audio_subseq_ids": absent,
            "right_padding_length": free,
        },
    }


if __name__ == "__main__":
    spec = Spec(**json.loads(Path(sys.argv[2]).read_text(encoding="utf-8")))
    found = read(spec.rows)
    {"trl": trl, "llamafactory": llamafactory}[sys.argv[1]](spec, found, Steps(found))
