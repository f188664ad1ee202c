"""Which keys a person set, on the command line or in yaml files of their own, and which of them differ from
the default."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path

from omegaconf import DictConfig, OmegaConf

from mft.config.inputs import SETTINGS
from mft.config.overrides import key_of
from mft.config.schema import config_dir


def given_keys(overrides: Sequence[str], config_dirs: Sequence[Path] = ()) -> list[str]:
    """Returns the keys that a person set: in overrides, and in their own yaml files that these choose."""
    keys = [key_of(o) for o in overrides]
    for override in overrides:
        group, _, options = override.lstrip("+~").partition("=")
        for option in options.strip("[]").split(","):
            for folder in config_dirs:
                path = folder / group / f"{option}.yaml"
                keys += _keys_of_yaml(path, group) if path.is_file() else []
    return keys


def _keys_of_yaml(path: Path, group: str) -> list[str]:
    header, _, package = path.read_text(encoding="utf-8").partition("\n")[0].partition("@package")
    prefix = package.strip() if header.strip() == "#" and package else group.replace("/", ".")
    loaded = OmegaConf.load(path)
    keys = _leaves(OmegaConf.to_container(loaded)) if isinstance(loaded, DictConfig) else []
    return keys if prefix == "_global_" else [f"{prefix}.{key}" for key in keys]


def _leaves(values: object, prefix: str = "") -> list[str]:
    if not isinstance(values, Mapping):
        return [prefix.removesuffix(".")]
    return [leaf for key, value in values.items() for leaf in _leaves(value, f"{prefix}{key}.")]


def is_default(cfg: DictConfig, key: str) -> bool:
    """Whether a value is what it is without anybody setting it: of a settings class, or of the chosen
    option's yaml."""
    group, _, name = key.partition(".")
    value = OmegaConf.select(cfg, key)
    if group in SETTINGS:
        default = next(field.default for field in dataclasses.fields(SETTINGS[group]) if field.name == name)
        return bool(value == default)
    path = config_dir() / group / f"{cfg.choices.get(group)}.yaml"
    return path.is_file() and name != "" and bool(OmegaConf.select(_with_bases(path), name) == value)


def _with_bases(path: Path) -> DictConfig:
    """Returns the values of an option's yaml over those of the yamls beside it that its defaults list
    names."""
    own = OmegaConf.load(path)
    assert isinstance(own, DictConfig)
    names = [name for name in own.pop("defaults", ()) if isinstance(name, str) and name != "_self_"]
    bases = [_with_bases(path.with_name(f"{name}.yaml")) for name in names]
    merged = OmegaConf.merge(*bases, own)
    assert isinstance(merged, DictConfig)
    return merged
