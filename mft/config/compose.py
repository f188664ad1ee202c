"""From command-line overrides to a resolved config."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

from mft.config.hydra_compose import compose_words, search_path, without_search_path
from mft.config.interpolations import replaced
from mft.config.messages import explain, of_defaults, refusals, task_not_chosen
from mft.config.overrides import check_overrides
from mft.config.places import check_places
from mft.config.schema import register, typed
from mft.config.yaml_file import circle
from mft.data.template_choice import is_file
from mft.errors import UserError, no_path, shortened


def compose(overrides: Sequence[str], config_dirs: Sequence[Path] = ()) -> DictConfig:
    """Returns the config that `overrides` compose from conf/ and further folders of yaml files, not yet
    resolved.

    Raises UserError for unknown groups, options and keys, and for values of the wrong type.
    """
    register()
    search: list[str] = []
    try:
        search = search_path(config_dirs, overrides)
        overrides = without_search_path(overrides)
        check_overrides(overrides)
        return compose_words([*search, *overrides])
    except RecursionError:
        raise UserError(circle()) from None
    except refusals() as error:
        raise UserError(explain(error, search, overrides)) from error
    except (ValueError, TypeError, AttributeError, OSError) as error:
        if (refusal := no_path(error)) is not None:
            raise refusal from error
        if (sentence := of_defaults(error)) is None:
            raise
        raise UserError(sentence) from error


def compose_resolved(overrides: Sequence[str], config_dirs: Sequence[Path] = ()) -> DictConfig:
    """Returns the composed config with paths of the settings made absolute and every interpolation replaced,
    but those of environment variables, which stay as they are written."""
    cfg = replaced(compose(overrides, config_dirs))
    try:
        return absolute_paths(typed(cfg))
    except refusals() as error:
        raise UserError(explain(error, search_path(config_dirs, overrides), overrides)) from error


def absolute_paths(cfg: DictConfig) -> DictConfig:
    """Makes the config independent of the folder it was composed in; `~` is expanded."""

    def absolute(path: str) -> str:
        if path.startswith("hf:"):  # a data set of the hub
            return path
        return os.path.abspath(os.path.expanduser(path))

    def place(node: Any, key: Any) -> str:
        value = node[key]
        if not OmegaConf.is_interpolation(node, key):
            return absolute(value)
        # of a variable, which stays as it is written
        written = os.path.expanduser(node._get_node(key)._value())
        return written if absolute(value) == os.path.expanduser(value) else os.path.join(os.getcwd(), written)

    def all_absolute(paths: Any, key: str) -> list[str]:
        if wrong := [path for path in paths if not isinstance(path, str) or not path.strip()]:
            raise UserError(f"{key}: {shortened(wrong[0])} must be a path, in quotes where it is a number.")
        return [place(paths, number) for number in range(len(paths))]

    check_places(cfg)
    cfg.output_dir, cfg.cache_dir = place(cfg, "output_dir"), place(cfg, "cache_dir")
    cfg.data.paths = all_absolute(cfg.data.paths, "data.paths")
    if is_file(cfg.data.template):
        cfg.data.template = place(cfg.data, "template")
    for name, task in cfg.task.items():
        if isinstance(task, DictConfig) and not {"_target_", "paths"} & set(task):
            chosen = [str(key) for key, node in cfg.task.items() if "_target_" in node]
            raise UserError(f"task.{name}.{next(map(str, task), '')}: {task_not_chosen(str(name), chosen)}")
        for key in ("paths", "valid"):
            if isinstance(task, DictConfig) and OmegaConf.is_list(task.get(key)):
                task[key] = all_absolute(task[key], f"task.{name}.{key}")
    return cfg
