"""Hydra's own composition, its search path and its node in the config.

Used of Hydra 1.3 without being public: `GlobalHydra.instance().hydra`, `Hydra.compose_config`, and the
override parser; `tests/config/test_hydra_compose.py` fails where one of them is gone.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, ListConfig, open_dict

from mft.config import hydra_node, plugins
from mft.config.components import package_of
from mft.config.interpolations import bound
from mft.config.overrides import in_plain_text, key_of
from mft.config.schema import config_dir
from mft.console import credentials
from mft.errors import UserError


def search_path(config_dirs: Sequence[Path], overrides: Sequence[str] = ()) -> list[str]:
    """Returns the override that adds folders of yaml files, and those of plug-ins, to conf/ and what
    `overrides` add: Hydra reads only the first of several. Raises UserError for one that is not a folder."""
    for folder in config_dirs:
        if not folder.is_dir():
            raise UserError(f"--config-dir {folder} is not a folder.")
    places = [place for o in overrides if key_of(o) == "hydra.searchpath" for place in places_of(o)]
    places += [f"file://{folder.resolve()}" for folder in (*config_dirs, *plugins.yaml_folders())]
    # Quoted, since the names of folders may hold commas, brackets and equals signs.
    quoted = ",".join("'" + place.replace("'", "\\'") + "'" for place in dict.fromkeys(places))
    return [f"hydra.searchpath=[{quoted}]"] if places else []


def places_of(search: str) -> list[str]:
    """Returns the folders and packages of an override of Hydra's search path; UserError for a package not
    named, which Hydra would import."""
    from hydra.core.override_parser.overrides_parser import OverridesParser

    places: Any = OverridesParser.create().parse_override(search).value()
    if not (isinstance(places, list) and all(isinstance(place, str) for place in places)):
        raise UserError(f"{search}: expected a list of folders, hydra.searchpath=['file:///my/folder'].")
    for place in places:
        if place.startswith("pkg://"):
            package = place.removeprefix("pkg://").replace("/", ".")
            package_of(f"{package}.", ["mft", "hydra", *plugins.allowed()], f"hydra.searchpath={place}")
        elif not Path(place.removeprefix("file://")).is_dir():
            raise UserError(f"hydra.searchpath: {place} is not a folder; --config-dir DIR adds one.")
    return places


def recorded_places(places: Iterable[str]) -> list[str]:
    """Returns what a search path has beside conf/ and the folders of plug-ins: folders, and packages as
    pkg://…"""
    of_plugins = set(map(str, plugins.yaml_folders()))
    folders = [place.removeprefix("file://") for place in places]
    return [folder for folder in folders if folder not in of_plugins]


def without_search_path(overrides: Sequence[str]) -> list[str]:
    """Returns the overrides but those that `search_path` has taken up."""
    return [o for o in overrides if key_of(o) != "hydra.searchpath"]


def check_sweep(overrides: Sequence[str]) -> DictConfig:
    """Judges Hydra's own node of a sweep, before Hydra builds its launcher, sweeper and callbacks; returns
    the config that it belongs to."""
    cfg = _with_hydra(overrides, sweep=True)
    bound(cfg)
    hydra_node.check(cfg.hydra)
    return cfg


def compose_words(words: Sequence[str]) -> DictConfig:
    """Returns what Hydra composes of the overrides as they are, without its own node."""
    return without_hydra(_with_hydra(words))


def _with_hydra(overrides: Sequence[str], sweep: bool = False) -> DictConfig:
    from hydra import initialize_config_dir
    from hydra.core.global_hydra import GlobalHydra
    from hydra.types import RunMode

    instance = GlobalHydra.instance()
    running, instance.hydra = instance.hydra, None  # of the sweep in which a wrong key is explained
    try:
        with initialize_config_dir(str(config_dir().resolve()), version_base="1.3"):
            hydra = instance.hydra
            assert hydra is not None
            return hydra.compose_config(
                config_name="config",
                overrides=list(overrides),
                run_mode=RunMode.MULTIRUN if sweep else RunMode.RUN,
                from_shell=False,
                with_log_configuration=False,
                validate_sweep_overrides=not sweep,
            )
    finally:
        instance.hydra = running


def without_hydra(cfg: DictConfig) -> DictConfig:
    """Takes Hydra's own node, once judged, out of a composed config; the options taken stay in `choices`."""
    bound(cfg)
    hydra_node.check(cfg.hydra)
    _refuse_credentials(cfg)
    with open_dict(cfg):  # the schema allows no key to be removed
        hydra = cfg.pop("hydra")
    folder = hydra.run._get_node("dir")._value()
    if folder != "${output_dir}" and not any(key_of(o) == "output_dir" for o in hydra.overrides.task):
        cfg.output_dir = folder  # a yaml set what Hydra's users call the run folder
    return with_choices(cfg, hydra.runtime.choices)


def with_choices(cfg: DictConfig, groups: Mapping[str, Any]) -> DictConfig:
    """Notes the option taken of every config group in `choices`."""
    cfg.choices = {name: str(option) for name, option in groups.items() if name in cfg and name != "choices"}
    return cfg


def _refuse_credentials(node: DictConfig | ListConfig, path: str = "") -> None:
    """Raises UserError for a password or key that an address in a config has written out."""
    for key in list(node) if isinstance(node, DictConfig) else range(len(node)):
        child: Any = node._get_node(key)
        value, here = child._value(), f"{path}.{key}" if path else str(key)
        # an item of a list is judged by the name of the list
        text = str(value) if isinstance(value, str | int | float) else ""  # a password may be a number
        if credentials.written_out(text, path if isinstance(key, int) else here):
            raise UserError(in_plain_text(here))
        if isinstance(child, DictConfig | ListConfig) and isinstance(value, dict | list):
            _refuse_credentials(child, here)
