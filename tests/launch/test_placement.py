"""Which rank this process is, and how many ranks a run will have."""

from __future__ import annotations

import os

import pytest

from mft.errors import UserError
from mft.launch.placement import RankInfo, detect_rank, ranks

pytestmark = pytest.mark.usefixtures("not_placed")


def test_a_process_knows_where_it_was_placed(monkeypatch: pytest.MonkeyPatch) -> None:
    assert detect_rank() is None and ranks("auto") >= 1
    before = dict(os.environ)
    slurm = {
        "PROCID": "5",
        "LOCALID": "1",
        "STEP_NUM_TASKS": "8",
        "STEP_NODELIST": "gpu[03-04]",
        "JOB_ID": "12345",
    }
    for name, value in (slurm | {"STEP_TASKS_PER_NODE": "4(x2)"}).items():
        monkeypatch.setenv(f"SLURM_{name}", value)
    try:
        assert detect_rank() == RankInfo(5, 8) and ranks(3) == 8
        assert (os.environ["MASTER_ADDR"], os.environ["MASTER_PORT"]) == ("gpu03", "22345")
        assert (os.environ["LOCAL_RANK"], os.environ["LOCAL_WORLD_SIZE"]) == ("1", "4")
    finally:
        for name in (
            set(os.environ) - set(before) - {f"SLURM_{key}" for key in (*slurm, "STEP_TASKS_PER_NODE")}
        ):
            del os.environ[name]


def test_a_slurm_step_of_one_task_launches_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SLURM_PROCID", "0")
    monkeypatch.setenv("SLURM_NTASKS", "4")  # a batch script outside srun
    assert detect_rank() is None
    monkeypatch.setenv("SLURM_STEP_NUM_TASKS", "1")
    assert detect_rank() is None


@pytest.mark.parametrize("nproc", [0, -1, "two", 1.5])
def test_a_wrong_number_of_ranks_is_refused(nproc: object) -> None:
    with pytest.raises(UserError, match=r"launch\.nproc="):
        ranks(nproc)  # type: ignore[arg-type]
