"""From command-line overrides to a resolved config."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from omegaconf import DictConfig

from mft.config.hydra_compose import compose_words, search_path, without_search_path
from mft.config.interpolations import replaced
from mft.config.messages import explained, task_not_chosen
from mft.config.overrides import check_overrides
from mft.config.places import absolute_paths
from mft.config.schema import register, typed
from mft.errors import UserError


def compose(overrides: Sequence[str], config_dirs: Sequence[Path] = ()) -> DictConfig:
    """Returns the config that `overrides` compose from conf/ and further folders of yaml files, not yet
    resolved.

    Raises UserError for unknown groups, options and keys, and for values of the wrong type.
    """
    register()
    check_overrides(overrides)  # before the search path, which is read from them
    search = search_path(config_dirs, overrides)
    with explained(search, overrides):
        return compose_words([*search, *without_search_path(overrides)])


def compose_resolved(overrides: Sequence[str], config_dirs: Sequence[Path] = ()) -> DictConfig:
    """Returns the composed config, `resolved`. Raises UserError as `compose`, and as `resolved`."""
    cfg = compose(overrides, config_dirs)
    with explained(search_path(config_dirs, overrides), overrides):
        return resolved(cfg)


def resolved(cfg: DictConfig) -> DictConfig:
    """Returns a composed config under its schema, with paths of the settings made absolute and every
    interpolation replaced, but those of environment variables, which stay as they are written.

    Raises UserError for interpolations and paths that lead nowhere.
    """
    cfg = typed(replaced(cfg))
    for name, task in cfg.task.items():
        if isinstance(task, DictConfig) and not {"_target_", "paths"} & set(task):
            chosen = [str(key) for key, node in cfg.task.items() if "_target_" in node]
            raise UserError(f"task.{name}.{next(map(str, task), '')}: {task_not_chosen(str(name), chosen)}")
    return absolute_paths(cfg)
