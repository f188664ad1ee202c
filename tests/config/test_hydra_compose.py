"""What is used of Hydra without being public is there."""

from __future__ import annotations

import inspect

from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
from hydra._internal.hydra import Hydra
from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.overrides_parser import OverridesParser

from mft.config.hydra_compose import compose_words
from mft.config.schema import register


def test_hydra_has_what_composing_uses_of_it() -> None:
    arguments = inspect.signature(Hydra.compose_config).parameters
    assert {"config_name", "overrides", "run_mode", "from_shell", "validate_sweep_overrides"} <= set(
        arguments
    )
    assert hasattr(GlobalHydra.instance(), "hydra")
    assert all(hasattr(BasicSweeper, name) for name in ("setup", "sweep", "validate_batch_is_legal"))
    assert OverridesParser.create().parse_override("a=[b,c]").value() == ["b", "c"]


def test_composing_inside_a_running_hydra_leaves_it_as_it_is() -> None:
    register()
    instance = GlobalHydra.instance()
    before = instance.hydra
    cfg = compose_words(["train.max_steps=3"])
    assert cfg.train.max_steps == 3 and "hydra" not in cfg and cfg.choices["peft"]
    assert instance.hydra is before
