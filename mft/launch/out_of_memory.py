"""When memory runs out: which settings to lower, their current values, and the command that says by how
much."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from mft.errors import UserError
from mft.estimate.room import ran_out
from mft.files.json_file import read_json
from mft.hardware import has_gpu
from mft.run_folder import MICRO_BATCH

if TYPE_CHECKING:
    from omegaconf import DictConfig

LOWER = ("train.per_device_batch_size", "train.per_device_eval_batch_size", "data.seq_length")
"""Numbers that lower memory, in the order worth trying."""

SWITCHES = {"model.gradient_checkpointing": "true", "peft": "qlora", "dist": "zero3"}
"""Choices that lower memory, in the order worth trying."""


def explain(error: BaseException, cfg: DictConfig, run_dir: Path) -> UserError | None:
    """Returns the sentence for memory of the machine or a GPU that ran out, None for any other error.

    cfg: the resolved config of the run in run_dir; the sentence names what to lower, with the present values,
    and the plan of the run.
    """
    if not ran_out(error):
        return None
    from omegaconf import OmegaConf

    first_line = (str(error).strip().splitlines() or [type(error).__name__])[0].strip()
    values = {path: OmegaConf.select(cfg, path) for path in LOWER}
    if found := read_json(run_dir / MICRO_BATCH).number("per_device_batch_size"):
        values[LOWER[0]] = f"auto, which found {found:g}"
    lower = [path if value is None else f"{path} (now {value})" for path, value in values.items()]
    switch = []
    for key, better in SWITCHES.items():
        now = OmegaConf.select(cfg, f"{key}._target_") or OmegaConf.select(cfg, key)
        now = str(now).rpartition(".")[2].lower()  # mft.model.peft.qlora.QLora -> qlora, True -> true
        if now != better and (now, better) != ("1", "true"):  # recomputing every layer is both
            switch.append(f"{key}={better} (now {now})")
    or_set = f"; or set {', '.join(switch)}" if switch else ""
    lowered = f"Lower {', '.join(lower[:-1])} or {lower[-1]}{or_set}."
    return UserError(f"Memory ran out ({first_line[:200]}). {lowered} {planned(run_dir)}")


def planned(run_dir: Path) -> str:
    """Returns the sentence that leads to the plan of a run."""
    from mft.config.repetition import plan_of  # it reads configs, which a parent that only launches need not

    return f"What each of them saves: {plan_of(run_dir)}{'' if has_gpu() else ' plan.gpu=cpu'}"
