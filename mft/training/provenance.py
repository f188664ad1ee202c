"""The provenance of a run: commit, versions, host, device. Kept in its folder, and as tags by trackers."""

from __future__ import annotations

import platform
import socket
import subprocess
from collections.abc import Mapping
from datetime import datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from mft.console.credentials import hidden
from mft.files.json_file import read_json, write_json

NAME = "provenance.json"

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


def tags(device: str, ranks: int) -> dict[str, str]:
    """Returns git commit and dirty flag of the working directory, versions, host and device. Never raises.

    device: cpu or cuda, as torch calls it; ranks: of the run, on all machines.
    """
    values = {"device": device_name(device), "ranks": str(ranks)}
    values |= {"host": socket.gethostname(), "python": platform.python_version(), "mft": _version("mft")}
    values |= {f"version.{name}": _version(name) for name in PACKAGES}
    if commit := _git("rev-parse", "HEAD"):
        values["git_commit"] = commit
        values["git_dirty"] = str(bool(_git("status", "--porcelain", "--untracked-files=no"))).lower()
    return values


def recorded(folder: Path, values: Mapping[str, str]) -> dict[str, str]:
    """Writes the tags of a run into its folder, credentials hidden; returns them as they were written.

    Of a resumed run, `started` is of its first start, and `changed.<tag>` says how a tag has changed since.
    """
    earlier = read_json(folder / NAME)
    written = {name: hidden(value) for name, value in values.items()}
    written["started"] = earlier.text("started") or datetime.now().astimezone().isoformat(timespec="seconds")
    for name, value in tuple(written.items()):
        changes = earlier.text(f"changed.{name}")
        if earlier.text(name) not in ("", value):
            changes = f"{changes or earlier.text(name)} -> {value}"
        if changes:
            written[f"changed.{name}"] = changes
    write_json(folder / NAME, written)
    return written


def device_name(device: str) -> str:
    """Returns the name of the GPU model, or of the processor, where the system tells it."""
    if device.startswith("cuda"):
        import torch

        return torch.cuda.get_device_name()
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="ignore")
    except OSError:
        text = ""
    names = [line.partition(":")[2].strip() for line in text.splitlines() if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


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
