"""The provenance of a run: commit, versions, host. Stored as tags with the run."""

from __future__ import annotations

import platform
import socket
import subprocess
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

PACKAGES = (
    "torch",
    "transformers",
    "accelerate",
    "peft",
    "bitsandbytes",
    "deepspeed",
    "hydra-core",
    "mlflow",
)


def tags() -> dict[str, str]:
    """Returns git commit and dirty flag of the working directory, versions and host. Never raises."""
    values = {"host": socket.gethostname(), "python": platform.python_version(), "mft": _version("mft")}
    values |= {f"version.{name}": _version(name) for name in PACKAGES}
    if commit := _git("rev-parse", "HEAD"):
        values["git_commit"] = commit
        values["git_dirty"] = str(bool(_git("status", "--porcelain", "--untracked-files=no"))).lower()
    return values


def fingerprint_tag(name: str) -> str:
    """Returns the tag that holds a fingerprint, for example base_model_fingerprint."""
    return f"{name.replace(' ', '_')}_fingerprint"


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"


def _git(*arguments: str) -> str:
    try:
        done = subprocess.run(["git", *arguments], capture_output=True, text=True, timeout=10, cwd=Path.cwd())
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout.strip() if done.returncode == 0 else ""
