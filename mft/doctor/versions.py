"""Installed versions, and whether they are within the ranges that mft declares. Imports none of them."""

from __future__ import annotations

import platform
import sys
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, metadata, requires, version
from typing import TYPE_CHECKING

from mft import __version__
from mft.doctor.finding import Finding, Part
from mft.doctor.needs import Needs

if TYPE_CHECKING:
    from packaging.specifiers import SpecifierSet

PACKAGES = (
    *("torch", "transformers", "peft", "accelerate", "hydra-core", "safetensors", "tokenizers"),
    *("bitsandbytes", "deepspeed", "mlflow", "flash-attn"),
)
"""Those that are listed also where nothing is wrong with them; of the others only what is wrong."""

SPECIAL = ("bitsandbytes", "deepspeed", "mlflow", "flash-attn")
"""Packages that some settings need and others do not."""

part = Part("versions")


def findings(needs: Needs) -> Iterator[Finding]:
    """Yields a line for mft, python and each package of note; needs: what the config needs of them."""
    yield part.ok("mft", __version__)
    yield _python()
    for name, wanted, extra in _requirements():
        try:
            found = version(name)
        except PackageNotFoundError:
            found = ""
        if extra and name not in SPECIAL:
            continue
        within = bool(found) and wanted.contains(found, prereleases=True)
        if within:
            if name in PACKAGES:
                yield part.ok(name, f"{found} (range {wanted or 'any'})")
            continue
        if extra and not found:  # its absence is told where it would be used
            continue
        what = f"{found} is outside the range {wanted}" if found else "not installed"
        cure = f"pip install '{name}{wanted}'"
        needed = needs.of(name) if name in SPECIAL else "mft"
        if needed:
            yield part.problem(name, f"{what}; needed by {needed}", cure)
        else:
            yield part.note(name, what, cure)


def _python() -> Finding:
    from packaging.specifiers import SpecifierSet

    wanted = SpecifierSet(metadata("mft")["Requires-Python"])
    found = platform.python_version()
    if not wanted.contains(found):
        return part.problem(
            "python", f"{found} is outside the range {wanted}", "make a venv with a newer one"
        )
    where = "in a virtual environment" if sys.prefix != sys.base_prefix else "not in a virtual environment"
    return part.ok("python", f"{found} on {platform.system()} {platform.machine()}, {where}")


def _requirements() -> Iterator[tuple[str, SpecifierSet, bool]]:
    """Yields (name, range, whether it belongs to an extra) of what mft declares, those of note first."""
    from packaging.requirements import Requirement

    parsed = [Requirement(text) for text in requires("mft") or ()]
    order = {name: place for place, name in enumerate(PACKAGES)}
    for requirement in sorted(parsed, key=lambda r: (order.get(r.name, len(order)), r.name)):
        yield requirement.name, requirement.specifier, "extra" in str(requirement.marker or "")
