"""The packages besides mft whose classes a config may name: installed plug-ins, and those of --plugin.

No yaml can add one. What was named is recorded in the run folder for ranks and later commands.
"""

from __future__ import annotations

import functools
import importlib.metadata
import importlib.util
import sys
from collections.abc import Iterable
from pathlib import Path

from mft.errors import UserError

GROUP = "mft.components"
"""Entry points of this group name the package of an installed plug-in."""

_named: dict[str, None] = {}
"""Of this process, in order. A command sets it once, before anything is composed."""


def start(packages: Iterable[str]) -> None:
    """Names the packages of a command line, and forgets those of an earlier command of this process."""
    _named.clear()
    name(packages)


def name(packages: Iterable[str]) -> None:
    """Adds packages to those whose classes a config may name; raises UserError for one that cannot be a
    plug-in."""
    for package in packages:
        flag = f"--plugin {package}"
        if not isinstance(package, str) or not all(part.isidentifier() for part in package.split(".")):
            raise UserError(f"{flag}: expected the name of a Python package, for example --plugin mypkg.")
        top = package.partition(".")[0]
        if top in (*sys.stdlib_module_names, "mft"):
            owner = "mft" if top == "mft" else "Python"
            raise UserError(f"{flag}: {top} is not a plug-in, but part of {owner}.")
        if _spec(top) is None:
            raise UserError(
                f"{flag}: there is no package {top!r} in this environment; install it, or put the folder "
                "that holds it into PYTHONPATH."
            )
        _named[package] = None  # a dict keeps the order and drops repetitions


def named() -> tuple[str, ...]:
    """Returns the packages that were named in this process, for the record of its run."""
    return tuple(_named)


def allowed() -> list[str]:
    """Returns all packages beside mft whose classes a config may name. Imports none of them."""
    return [*_named, *(package for package in _installed(tuple(sys.path)) if package not in _named)]


def yaml_folders() -> list[Path]:
    """Returns the folders `conf` of plug-ins, whose yaml files stand beside those of mft."""
    folders = []
    for package in allowed():
        spec = _spec(package.partition(".")[0])
        for place in (spec.submodule_search_locations or ()) if spec else ():
            folder = Path(place, *package.split(".")[1:], "conf")
            if folder.is_dir():
                folders.append(folder)
    return folders


def _spec(top: str) -> importlib.machinery.ModuleSpec | None:
    try:
        return importlib.util.find_spec(top)  # of a top-level name nothing is imported
    except (ImportError, ValueError):  # ValueError: a module that was loaded by hand has no spec
        return None


@functools.lru_cache(maxsize=4)
def _installed(search: tuple[str, ...]) -> tuple[str, ...]:
    """search: sys.path, of which what is installed depends."""
    modules = [point.module for point in importlib.metadata.entry_points(group=GROUP)]
    tops = {module: module.partition(".")[0] for module in modules}
    return tuple(dict.fromkeys(m for m, top in tops.items() if top not in (*sys.stdlib_module_names, "mft")))
