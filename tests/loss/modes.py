"""Every mode of conf/loss as its yaml has it, with windows so short that its weights move within a few
steps."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

from hydra import compose, initialize_config_dir
from hydra.utils import instantiate

from mft.loss.base import TaskLoss

CONF = Path(__file__).parents[2] / "conf"
ALIASES = {
    "case1": "token_mean",
    "case2": "sample_mean",
    "case3": "task_token_mean",
    "case4": "task_sample_mean",
    "self-paced": "self_paced",
}
MODES = sorted({path.stem for path in (CONF / "loss").glob("*.yaml")} - set(ALIASES))
SHORT = {"warmup_steps": 3, "history_length": 4, "window": 1, "update_interval": 1}


@functools.cache
def config(name: str, group: str = "loss") -> Any:
    """Returns the composed node of one option, on its own; not to be changed."""
    with initialize_config_dir(str(CONF), version_base="1.3"):
        return compose(overrides=[f"+{group}={name}"])[group]


def made(name: str, **values: Any) -> TaskLoss:
    """Returns the mode, not started; `values` override its fields."""
    node = config(name).copy()
    node.update({key: value for key, value in SHORT.items() if key in node} | values)
    return instantiate(node, _convert_="all")
