"""What a parent does before it launches: nothing heavy in its own process."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from tests.tiny_runs import two_tasks

REPOSITORY = Path(__file__).parents[2]


@pytest.mark.slow
def test_a_checked_job_has_imported_nothing_heavy_but_its_fork_server_has_what_the_run_needs(
    tmp_path: Path, tiny_folder: Path
) -> None:
    code = f"""
import multiprocessing, sys
from mft.launch import job
from mft.config.compose import compose_resolved
overrides = ["model.path={tiny_folder}", "tracking=[]", "dist=zero2", "cache_dir={tmp_path}"]
overrides.append("{two_tasks(tmp_path / "tasks")}")
job.checked(compose_resolved(overrides), overrides)
heavy = {{"torch", "transformers", "peft", "accelerate", "deepspeed", "mlflow"}}
print(sorted(heavy & set(sys.modules)))
with multiprocessing.get_context("forkserver").Pool(1) as pool:
    print(pool.apply(eval, ("sorted({{'torch', 'peft', 'deepspeed'}} & set(__import__('sys').modules))",)))
"""
    environment = {
        "OMP_NUM_THREADS": "1",
        "PATH": "/usr/bin:/bin",
        "HOME": str(tmp_path),
        "HF_HUB_OFFLINE": "1",
    }
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=REPOSITORY,
        env=environment,
        capture_output=True,
        text=True,
        timeout=180,
    )
    assert done.stdout.splitlines() == ["[]", "['deepspeed', 'peft', 'torch']"], done.stderr
