"""The warning of a run that will hardly fit into memory, before its model is loaded."""

from __future__ import annotations

import logging
from dataclasses import replace
from pathlib import Path
from typing import Any

from mft.assembly.start import Run
from mft.config.repetition import plan_of
from mft.estimate.memory import USABLE, size_words
from mft.hardware import machine_memory
from mft.plan.case import Case, case_on
from mft.plan.gpus import CPU, Device
from mft.plan.memory import PROCESS, room
from mft.plan.plan import plan

log = logging.getLogger(__name__)

TRAINED = 24
"""Bytes of a weight at most, trained in full."""

PER_LOGIT, PER_UNIT = 16, 200
"""Bytes at most of a token's logit, and of a unit of its hidden states in a layer."""


def warn_of_memory(r: Run) -> None:
    """Shows what a rank needs of memory where that is more than the smallest of their devices has, or than
    their machines have for what is offloaded; the run goes on. All ranks call it."""
    of, host = case_of(r), float(machine_memory())
    least = min(r.engine.gather((of.device.memory, of.device.name)))
    host = min(r.engine.gather(host))
    if not r.engine.is_main:
        return
    on_gpu = of.device.kind == "cuda"
    smallest = replace(of.device, memory=least[0], name=least[1])
    if shortage := shortage_of(replace(of, device=smallest, host=host if on_gpu else None)):
        r.progress.show(f"warning: {shortage} What to change: {plan_of(r.folder)}")


def case_of(r: Run) -> Case:
    """Returns a run on the device of this rank, as `mft plan` has it."""
    if r.engine.device.type == "cuda":
        import torch

        found = torch.cuda.get_device_properties(r.engine.device)
        device = Device(found.name, float(found.total_memory), visible=True)
    else:
        device = Device(CPU, float(machine_memory()))
    return case_on(r.cfg, r.parts, device, r.engine.world, r.skeletons)


def shortage_of(of: Case) -> str:
    """Returns the warning for a device with too little memory, "" where it is enough or unknown."""
    if surely_fits(of):
        return ""
    try:
        made = plan(of, None)
    except Exception as error:  # a class of model may object to having no weights; that ends no run
        log.warning("memory is not estimated: %s: %s", type(error).__name__, " ".join(str(error).split()))
        return ""
    if made.fits:
        return ""
    if made.peak > made.room:
        needed, usable = size_words(made.peak), size_words(made.room)
        return f"a rank needs about {needed} of memory, and {of.device.name} has {usable} for it."
    needed, usable = size_words(made.on_host), size_words(USABLE * (of.host or 0))
    return (
        f"{of.together} rank{'s' * (of.together > 1)} of a machine need about {needed} of its memory for what "
        f"is offloaded and saved, and it has {usable} for it."
    )


def surely_fits(of: Case) -> bool:
    """Whether a generous bound of what any training of the model takes fits, so that nothing is estimated.

    It keeps the start of small runs quick: the estimate takes up to a second or two.
    """
    folder = Path(of.parts.model.location())
    files = [*folder.glob("*.safetensors")] if folder.is_dir() else []
    if not files:
        return False
    text: Any = of.parts.model.config().get_text_config()
    names = ("vocab_size", "num_hidden_layers", "hidden_size")
    if not all(isinstance(getattr(text, name, None), int) for name in names):
        return False
    weights = sum(file.stat().st_size for file in files) / 2  # of at least two bytes, or packed
    a_token = PER_LOGIT * text.vocab_size + PER_UNIT * text.num_hidden_layers * text.hidden_size
    if of.host is not None and of.parts.dist.divided_parts():  # what is offloaded, or gathered
        host = of.together * (TRAINED * weights + PROCESS)
        if host > USABLE * of.host:
            return False
    return bool(TRAINED * weights + a_token * of.tokens < room(of) / 2)
