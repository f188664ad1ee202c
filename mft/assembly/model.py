"""The model of a run: loaded, with what is trained in it, which layers it recomputes, and what it answers."""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mft.assembly.loader import plan
from mft.assembly.start import Run, require_unchanged
from mft.assembly.warning import case_of
from mft.console.tables import settings_table
from mft.data.loader import BatchLoader
from mft.data.prompts import read_prompts
from mft.distributed.rng import seed_everything
from mft.estimate.memory import size_words
from mft.files.checksums import require_sound
from mft.files.json_file import write_json
from mft.model.causal_lm import CHECKPOINTING_ABOVE
from mft.model.introspect import parameter_count
from mft.plan.memory import needed, room
from mft.training.sample_answers import Answers

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedModel

    Model = PreTrainedModel | PeftModel


def load_model(r: Run) -> Model:
    """Returns the model with what the peft mode adds to it, the same on every rank."""
    from mft.model.peft.full import compute_dtype

    family, peft, precision = r.parts.model, r.parts.peft, r.settings.precision.value
    seed_everything(r.settings.seed)  # equal initial adapters on every rank
    computing = compute_dtype(precision)
    if r.first_here and Path(family.source()).is_dir():  # passes folders that mft did not write
        require_sound(Path(family.source()))
    quantization = peft.quantization(computing, r.parts.dist.casts_weights_to(precision))
    with r.engine.loading(quantised=quantization is not None) as device:
        base = family.model(peft.dtype(precision), quantization, compute_dtype=computing, device=device)
    model: Any = peft.attach(base, family)
    require_unchanged(r.cfg, r.folder, r.parts)
    return model  # type: ignore[no-any-return]


def checkpoint_layers(r: Run, model: Model) -> tuple[int, str]:
    """Turns gradient checkpointing on as model.gradient_checkpointing says; returns of how many layers one is
    recomputed, 0 = none, and that in words, with the reason where it is auto.

    On a GPU auto chooses by memory, as `mft plan` does. All ranks do what the one chooses that has to
    recompute most: they exchange weights layer by layer where these are divided.
    """
    from mft.model import checkpointing

    reason = ""

    def by_memory() -> int:
        nonlocal reason
        chosen, reason = min(r.engine.gather(_recomputed(r, model)), key=lambda found: found[0] or math.inf)
        return chosen

    every = r.parts.model.checkpoint(model, by_memory if r.engine.device.type == "cuda" else None)
    return every, checkpointing.described(every) + reason


def _recomputed(r: Run, model: Model) -> tuple[int, str]:
    """Returns of how many layers one is recomputed on this rank's GPU, 0 = none, and why."""
    of = case_of(r)
    try:
        found = needed(of)
    except Exception as error:  # a class of model may object to having no weights
        why = " ".join(str(error).split())
        every = int(parameter_count(model) > CHECKPOINTING_ABOVE)
        return every, f"; auto: by the number of weights, since memory is not estimated: {why}"
    return (
        found.every,
        f"; auto: about {size_words(found.peak)} of the {size_words(room(of))} that a GPU has for it",
    )


def show_model(r: Run, loader: BatchLoader, model: Model, checkpointing: str) -> None:
    """Shows which weights are trained, and how. checkpointing: in words."""
    from mft.model import fused_layers
    from mft.model.attention import described
    from mft.model.introspect import base_of
    from mft.model.peft import summary as trained_weights
    from mft.model.peft.full import compute_dtype

    trained = r.parts.peft.audit(model)
    if r.engine.is_main:
        write_json(r.folder / "report" / "trained.json", trained_weights.as_json(trained))
    r.progress.show(trained_weights.table(trained))
    precision = f"{r.settings.precision.value} on {r.engine.device}"
    attention = described(base_of(model), r.engine.device, compute_dtype(r.settings.precision.value))
    facts = plan(r.parts, loader) | {
        "precision": f"{precision}, attention {attention}",
        "gradient checkpointing": checkpointing,
    }
    if layers := fused_layers.described(model):
        facts["fused layers"] = layers
    if adapters := r.parts.peft.computation(model):
        facts["adapters"] = adapters
    r.progress.show(settings_table(facts.items(), "training"))


def make_answers(r: Run, model: Model) -> Answers:
    """Returns what asks the model the prompts of train.prompts; a sharded model needs all ranks to answer."""
    from mft.model import generate

    engine, encoder = r.engine, r.data.encoder
    options: dict[str, Any] = {"max_new_tokens": r.settings.prompts_max_new_tokens, "do_sample": False}
    options |= {"together": engine.sharded, "device": engine.device}

    def answer(conversations: list[list[dict[str, str]]]) -> list[str]:
        model.eval()
        texts = engine.run_as_forward(lambda: generate.answer(model, encoder, conversations, **options))
        model.train()
        return texts

    prompts = read_prompts(Path(r.settings.prompts)) if r.settings.prompts else []
    return Answers(prompts if engine.is_main or engine.sharded else [], answer)
