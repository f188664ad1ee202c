"""Models without weights that estimates are made of, each built and counted once.

What a rank needs depends on the backend and the rows, too; the model does not: plans of a config on several
devices, and of changes of it, have most of this in common.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, TypeVar

from mft.config.build import Components
from mft.estimate.memory import Sizes
from mft.estimate.sizes import Model, experts, units

if TYPE_CHECKING:
    from mft.model.causal_lm import CausalLM
    from mft.model.flops import TokenFlops
    from mft.model.peft.full import Full

T = TypeVar("T")


class Skeleton:
    """A model as it is trained, on the meta device, and what was counted in it.

    precision: bf16, fp16 or fp32; cast_to: see `prepared_skeleton`. Raises UserError for a model that only its
    own code can build.
    """

    def __init__(self, family: CausalLM, peft: Full, precision: str, cast_to: str | None):
        from mft.model.introspect import parameter_count
        from mft.model.prepared_skeleton import prepared_skeleton

        self.model: Any = prepared_skeleton(family, peft, precision, cast_to)
        """Its layers keep their activations."""
        self.classes = family.layer_classes(self.model)
        """Names of the decoder layers' classes."""
        self.sizes = Sizes.of(self.model, peft.audit(self.model))
        self.total = parameter_count(self.model)
        """Weights of the base, with new tokens, and of adapters."""
        self.bits: int = getattr(peft, "bits", 0)
        """Of a weight that is quantised, 0: none is."""
        self._counted: dict[Any, Any] = {}

    def flops(self, every: int) -> TokenFlops:
        """Returns the matrix work of a token; every: of so many layers one is recomputed, 0 = none."""
        from mft.model.flops import token_flops

        return self.once(("flops", every), lambda: token_flops(self.model, self.classes, every))

    def divided(self, half: bool, cast: bool, threshold: int) -> tuple[Model, tuple[int, int]]:
        """Returns the sizes of the model's units, and those of its routed experts (see `experts`).

        half: whether the run computes in bf16 or fp16; cast: whether frozen weights are cast to that;
        threshold: elements up to which ZeRO-3 keeps a weight whole.
        """

        def size(weight: Any) -> int:
            from mft.model.peft.summary import bytes_of

            smaller = cast and half and weight.is_floating_point()
            return min(bytes_of(weight), 2 * weight.numel()) if smaller else bytes_of(weight)

        def kept_whole(weight: Any) -> int:
            count, each = weight.numel(), 2 if half else 4
            storage = getattr(weight, "quant_storage", None)
            if storage is not None and getattr(weight, "bnb_quantized", None) is False:
                # packed two to a byte, and counted in elements of what holds them
                count, each = -(-count // (2 * storage.itemsize)), storage.itemsize
            return int(count * each) if count <= threshold else 0

        return self.once(
            ("divided", half, cast, threshold),
            lambda: (units(self.model, self.classes, size, kept_whole), experts(self.model, size)),
        )

    def once(self, key: Any, count: Callable[[], T]) -> T:
        """Returns what `count` returned the first time that it was called for a key."""
        if key not in self._counted:
            self._counted[key] = count()
        found: T = self._counted[key]
        return found


class Skeletons:
    """The skeletons of one plan, or of one run, by what they depend on."""

    def __init__(self) -> None:
        self._built: dict[str, Skeleton] = {}

    def of(self, parts: Components, precision: str) -> Skeleton:
        """Returns the skeleton of a config's model and peft mode; precision: bf16, fp16 or fp32."""
        from mft.model.peft.full import compute_dtype

        family, peft, cast_to = parts.model, parts.peft, parts.dist.casts_weights_to(precision)
        settings = {field.name: getattr(family, field.name) for field in dataclasses.fields(family)}
        del settings["gradient_checkpointing"]  # a skeleton stands for all of its values
        quantised = peft.quantization(compute_dtype(precision), cast_to)
        key = repr((type(family), settings, type(peft), peft, precision, quantised))
        if key not in self._built:
            self._built[key] = Skeleton(family, peft, precision, cast_to)
        return self._built[key]
