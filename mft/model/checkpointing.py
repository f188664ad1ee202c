"""Gradient checkpointing: how many layers make their activations again in the backward pass.

Where no step can be watched (`step_trace`), what layers keep is estimated from the shapes of their matrices.
tests/model/test_checkpointing.py measures it with hooks on what autograd saves, for several families: the
estimate lies above, by 55 % at most.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from mft.errors import UserError, check_choice
from mft.model.introspect import base_of
from mft.model.peft.targets import active_shares, roles, weights
from mft.model.transformers_private import attention_name

if TYPE_CHECKING:
    from torch import nn

SETTING = "model.gradient_checkpointing"

EVERY = (0, 4, 2, 1)
"""Of so many layers one is recomputed, 0 = none: from fast to small, what `auto` chooses from."""

PER_FEATURE = {(True, False): 3.3, (True, True): 3.1, (False, False): 6.0, (False, True): 5.7}
"""(Whether the run computes in half precision, whether the base is frozen) → bytes that a token's
activations take for each input and output of a layer's matrices."""

PER_DROPPED = 1
"""Bytes of the mask that dropout keeps on a GPU for each input of an adapter. What it makes of the input is
kept too, which PER_FEATURE has already: it counts an input for each matrix, also where several read one."""

PER_SCORE = {True: 7, False: 5}
"""Whether the run computes in half precision → bytes of a score that eager attention keeps; the other
implementations keep none."""

WORDS = {"auto": None, "true": 1, "false": 0}
"""Settings that are no number → of so many layers one is recomputed, 0 = none, None: by memory."""


def layers_between(setting: object) -> int | None:
    """Returns of how many layers one is recomputed by model.gradient_checkpointing: 0 = none, None = auto.

    Raises UserError for a value that is neither auto, true, false nor a whole number from 1 on.
    """
    text = str(setting).lower()
    if not text.isdigit():
        check_choice(SETTING, text if text in WORDS else setting, (*WORDS, "a whole number from 1 on"))
        return WORDS[text]
    if not int(text):
        raise UserError(f"{SETTING}=0: of every so many layers one is recomputed, at least 1; false = none")
    return int(text)


@dataclass(frozen=True)
class Layers:
    """What the decoder layers of a model keep for the backward pass."""

    count: int
    kept: float
    """Bytes of a token in a layer that keeps its activations."""
    boundary: float
    """Bytes of a token in one that is recomputed: its input."""

    @classmethod
    def of(cls, model: nn.Module, classes: list[str], half: bool, longest: int) -> Layers:
        """model: plain or peft, with its fused layers; classes: names of the layers' classes; half: whether the run
        computes in bf16 or fp16; longest: tokens of a sample, for eager attention."""
        from mft.model.fused_layers import spared

        base: Any = base_of(model)
        config = base.config.get_text_config()
        layers = [part for part in model.modules() if type(part).__name__ in classes]
        frozen = not all(p.requires_grad for p in model.parameters())
        by_layer = []
        for layer in layers:
            matrices = [(path, shape) for path, _, shape in weights(layer) if len(shape) > 1]
            role, active = roles(dict(matrices)), active_shares(dict(matrices), config)
            # adapters are between the inputs and outputs that count already
            own = [(path, shape) for path, shape in matrices if ".lora_" not in path]
            copies = {path: active[path] * shape[0] if role[path] == "experts" else 1 for path, shape in own}
            features = sum(copies[path] * sum(shape[-2:]) for path, shape in own)
            kept = PER_FEATURE[half, frozen] * features + PER_DROPPED * _dropped(layer)
            by_layer.append(kept - spared(layer, 2 if half else 4))
        kept = max(by_layer, default=0.0)
        if "eager" in attention_name(base):
            kept += PER_SCORE[half] * longest * (getattr(config, "num_attention_heads", 0) or 0)
        return cls(len(layers), kept, 4.0 * _width(config))

    def bytes(self, every: int, tokens: int) -> float:
        """Returns what is kept of a micro-batch, with the layer that is being recomputed."""
        again = math.ceil(self.count / every) if every else 0
        whole = self.count - again + (1 if again else 0)
        return tokens * (whole * self.kept + again * self.boundary)


def _width(config: Any) -> int:
    """Returns the width of the hidden states; of a model of several parts (BLT) that of the widest."""
    parts = [config, *(getattr(config, name, None) for name in config.sub_configs)]
    return max(getattr(part, "hidden_size", 0) or 0 for part in parts)


def _dropped(layer: nn.Module) -> int:
    """Returns the inputs of a layer's adapters that have dropout."""
    adapted: list[Any] = [part for part in layer.modules() if hasattr(part, "lora_dropout")]
    drops = [(part.in_features, each) for part in adapted for each in part.lora_dropout.values()]
    return sum(width for width, each in drops if getattr(each, "p", 0))  # an Identity without dropout


def described(every: int) -> str:
    """Returns which layers are recomputed, for people."""
    return {0: "off", 1: "on"}.get(every, f"one of {every} layers")


def enable(base: Any, classes: list[str], every: int) -> bool:
    """Lets one of `every` layers recompute its activations; returns False where its class cannot do exactly
    that."""
    if not base.supports_gradient_checkpointing:
        return False
    # The reentrant kind loses gradients of adapters behind a frozen embedding and breaks DDP.
    base.activation_checkpointing_enable({"use_reentrant": False}, every_n_layers=every)
    if every == 1:
        return True
    # classes with the older hook ignore the number
    layers = [part for part in base.modules() if type(part).__name__ in classes]
    chosen = [getattr(layer, "gradient_checkpointing", None) for layer in layers]
    if chosen == [number % every == 0 for number in range(len(layers))]:
        return True
    disable(base)
    return False


def disable(base: Any) -> None:
    """Lets all layers keep their activations again."""
    if base.is_activation_checkpointing:
        base.activation_checkpointing_disable()
        base.disable_input_require_grads()  # which enabling has added, and disabling leaves
