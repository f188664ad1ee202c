"""An installed wheel finds its conf/ and composes, away from the checkout."""

from __future__ import annotations

import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


@pytest.mark.slow
def test_wheel_composes_as_the_checkout_does(tmp_path: Path) -> None:
    build = [
        sys.executable,
        "-m",
        "pip",
        "wheel",
        "-q",
        "--no-deps",
        "--no-build-isolation",
        "-w",
        str(tmp_path),
    ]
    subprocess.run([*build, str(ROOT)], check=True, timeout=300)
    (wheel,) = tmp_path.glob("mft-*.whl")
    site = tmp_path / "site"
    zipfile.ZipFile(wheel).extractall(site)
    code = """
import pathlib, mft.config.schema, mft.cli
from mft.config.compose import compose_resolved
print(mft.config.schema.config_dir())
cfg = compose_resolved(["model=tiny", "debug=fast", "loss=case1"])
assert cfg.loss._target_ == "mft.loss.means.TokenMean" and cfg.train.max_steps == 3
"""
    env = os.environ | {"PYTHONPATH": str(site)}
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == str(site / "mft" / "conf")
    names = zipfile.ZipFile(wheel).namelist()
    assert "hydra_plugins/mft_launcher.py" in names and "mft/conf/loss/task_token_mean.yaml" in names
    page = {f"mft/comparison/page/{name}" for name in ("report.html", "report.css", "sort.js")}
    assert page <= set(names)
    inside = {name.removeprefix("mft/conf/") for name in names if name.startswith("mft/conf/")}
    here = {
        str(p.relative_to(ROOT / "conf")) for p in (ROOT / "conf").rglob("*.yaml") if p.parent.name != "local"
    }
    assert here <= inside
