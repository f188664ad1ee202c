"""What estimates of one plan share, and what they must not."""

from __future__ import annotations

from pathlib import Path

import pytest

from mft.config.build import Components, build_components
from mft.config.compose import compose_resolved
from mft.estimate.rank import rank_memory
from mft.estimate.skeletons import Skeletons
from mft.model.tiny import Tiny


def config(tmp_path: Path, cache_dir: Path, *overrides: str) -> list[str]:
    given = ["debug=fast", f"cache_dir={cache_dir}", f"output_dir={tmp_path}", "data.paths=[/tmp/rows.jsonl]"]
    return [*given, *overrides]


@pytest.mark.parametrize(
    ("overrides", "same"),
    [
        (("dist=zero3", "train.per_device_batch_size=2"), True),
        (("model.gradient_checkpointing=true",), True),
        (("peft=full",), False),
        (("peft.rank=3",), False),
    ],
)
def test_a_model_is_built_once_for_all_it_does_not_depend_on(
    overrides: tuple[str, ...], same: bool, tiny: Tiny, cache_dir: Path, tmp_path: Path
) -> None:
    def parts(*more: str) -> Components:
        return build_components(compose_resolved(config(tmp_path, cache_dir, *more)))

    skeletons = Skeletons()
    first = skeletons.of(parts("peft=lora"), "bf16")
    peft = () if any(word.startswith("peft=") for word in overrides) else ("peft=lora",)
    assert (skeletons.of(parts(*peft, *overrides), "bf16") is first) is same
    assert skeletons.of(parts("peft=lora"), "fp32") is not first


def test_estimates_that_share_are_those_that_stand_alone(tiny: Tiny, cache_dir: Path, tmp_path: Path) -> None:
    skeletons = Skeletons()
    for dist in ("single", "fsdp"):
        for every in ("true", "false", "2", "true"):
            words = ("peft=lora", f"dist={dist}", f"model.gradient_checkpointing={every}")
            cfg = compose_resolved(config(tmp_path, cache_dir, *words))
            shared = rank_memory(cfg, 2, skeletons=skeletons)
            assert shared == rank_memory(cfg, 2) and not shared.notes
