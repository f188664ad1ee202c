"""`mft train` in ranks that torchrun, accelerate launch or srun started: one folder, one config, written by
rank 0."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from mft import run_folder
from mft.training.checkpoint import newest
from tests.distributed.runs import LAYOUTS, SETTINGS, logged, write_tasks
from tests.selection import long

REPOSITORY = Path(__file__).parents[2]
TORCHRUN = ["torch.distributed.run", "--standalone", "--nproc-per-node=2"]
COMMON = """\
compute_environment: LOCAL_MACHINE
downcast_bf16: 'no'
dynamo_backend: 'NO'
machine_rank: 0
main_training_function: main
megatron_lm_config: {}
mixed_precision: bf16
num_machines: 1
num_processes: 2
rdzv_backend: static
same_network: true
use_cpu: true
"""
"""What both of the original's files say, but for the number of processes and the CPU."""
DS_CONFIG = f"""\
{COMMON}
distributed_type: DEEPSPEED
deepspeed_config:
  gradient_accumulation_steps: 1
  gradient_clipping: 1.0
  offload_optimizer_device: cpu
  offload_param_device: none
  zero3_init_flag: false
  zero3_save_16bit_model: true
  zero_stage: 2
fsdp_config: {{}}
"""
FSDP_CONFIG = f"""\
{COMMON}
distributed_type: FSDP
deepspeed_config: {{}}
fsdp_config:
  fsdp_auto_wrap_policy: TRANSFORMER_BASED_WRAP
  fsdp_backward_prefetch_policy: BACKWARD_PRE
  fsdp_offload_params: false
  fsdp_sharding_strategy: 1
  fsdp_state_dict_type: FULL_STATE_DICT
  fsdp_transformer_layer_cls_to_wrap: LlamaDecoderLayer
"""


def launched(launcher: list[str], overrides: list[str]) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", *launcher, "-m", "mft.cli", "train", *overrides],
        cwd=REPOSITORY,
        env=os.environ | {"PYTHONPATH": str(REPOSITORY), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=180,
    )


@pytest.mark.slow
@pytest.mark.dist
@pytest.mark.parametrize("how", ["torchrun", long("accelerate ds"), long("accelerate fsdp")])
def test_placed_ranks_share_one_run_and_conf_dist_decides(tmp_path: Path, how: str) -> None:
    if how == "torchrun":
        launcher = TORCHRUN
    else:
        file = tmp_path / "accelerate.yaml"
        file.write_text(DS_CONFIG if how == "accelerate ds" else FSDP_CONFIG)
        launcher = ["accelerate.commands.launch", "--config_file", str(file)]
    data = f"data.paths=[{','.join(map(str, write_tasks(tmp_path / 'tasks')))}]"
    backend = {"torchrun": "ddp", "accelerate ds": "zero2", "accelerate fsdp": "fsdp"}[how]
    overrides = [*SETTINGS, *LAYOUTS["pad"], data, f"cache_dir={tmp_path / 'cache'}", "train.max_steps=3"]
    done = launched(launcher, [*overrides, f"output_dir={tmp_path / 'run'}", f"dist={backend}", "peft=lora"])
    assert done.returncode == 0, done.stderr[-3000:]
    folder = tmp_path / "run"
    assert (
        len(logged(folder, "train/loss")) == 3 and (folder / "final" / "adapter_model.safetensors").exists()
    )
    assert (folder / "log" / "rank1.log").exists()


@pytest.mark.slow
@pytest.mark.dist
@pytest.mark.long
def test_placed_ranks_are_refused_once(tmp_path: Path) -> None:
    """Rank 0 alone composes and checks: it says once what is wrong, and the others do not wait for it."""
    data = f"data.paths=[{','.join(map(str, write_tasks(tmp_path / 'tasks')))}]"
    overrides = [*SETTINGS, *LAYOUTS["pad"], data, f"cache_dir={tmp_path / 'cache'}"]
    refused = launched(TORCHRUN, ["-m", *overrides])
    assert refused.returncode != 0 and "A sweep (-m) starts the ranks of its jobs itself" in refused.stderr
    refused = launched(TORCHRUN, [*overrides, "optimizer.lr=-1"])
    assert refused.returncode != 0 and refused.stderr.count("optimizer.lr=-1 must be greater than 0") == 1


@pytest.mark.slow
@pytest.mark.dist
@pytest.mark.long
def test_the_slurm_script_trains_saves_in_time_and_is_put_back_into_the_queue(tmp_path: Path) -> None:
    """docs/slurm.sbatch as it is; srun and scontrol are stand-ins, since SLURM is not here."""
    (tmp_path / "bin").mkdir()
    stand_ins = {
        "srun": f'exec {sys.executable} -m tests.launch.srun "$@"',
        "mft": f'exec {sys.executable} -m mft.cli "$@"',
        "scontrol": f'echo "$@" > {tmp_path / "asked"}',
    }
    for name, line in stand_ins.items():
        (tmp_path / "bin" / name).write_text(f"#!/bin/sh\n{line}\n")
        (tmp_path / "bin" / name).chmod(0o755)
    folder = tmp_path / "run"
    data = f"data.paths=[{','.join(map(str, write_tasks(tmp_path / 'tasks')))}]"
    overrides = [*SETTINGS, *LAYOUTS["pad"], data, f"cache_dir={tmp_path / 'cache'}", f"output_dir={folder}"]
    script = subprocess.Popen(
        [
            "bash",
            "docs/slurm.sbatch",
            *overrides,
            "dist=zero2",
            "train.max_steps=100000",
            "train.epochs=100000",
        ],
        cwd=REPOSITORY,
        env=os.environ
        | {"PATH": f"{tmp_path / 'bin'}:{os.environ['PATH']}", "SLURM_JOB_ID": "77"}
        | {"PYTHONPATH": str(REPOSITORY), "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    end = time.monotonic() + 120
    while not (folder / "metrics.jsonl").exists() or len(logged(folder, "train/loss")) < 2:
        if script.poll() is not None or time.monotonic() > end:
            script.kill()
            raise AssertionError(script.communicate(timeout=60)[0])
        time.sleep(0.1)
    (srun,) = psutil.Process(script.pid).children()
    srun.send_signal(signal.SIGTERM)  # what `#SBATCH --signal` does before the time is over
    output = script.communicate(timeout=60)[0]
    assert script.returncode == 75, output
    assert (tmp_path / "asked").read_text() == "requeue 77\n"
    assert run_folder.status(folder) == "stopped" and newest(folder) is not None
    assert (
        "2/100000" in (folder / "log" / "rank0.log").read_text() and (folder / "log" / "rank1.log").exists()
    )
