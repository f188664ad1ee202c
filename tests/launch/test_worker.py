"""One rank: what it refuses."""

from __future__ import annotations

from pathlib import Path

import pytest

from mft.errors import UserError
from mft.launch.worker import main, newer, run_job


def test_a_folder_without_a_run_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"config\.yaml does not exist: give the folder of a run\."):
        run_job(str(tmp_path))
    with pytest.raises(SystemExit, match=r"^usage: python -m mft\.launch\.worker RUN_DIR"):
        main([])


def test_a_report_that_is_removed_meanwhile_is_not_a_new_one(tmp_path: Path) -> None:
    report = tmp_path / "rank1.error.json"
    assert not newer(report, 0.0)
    report.touch()
    assert newer(report, 0.0) and not newer(report, report.stat().st_mtime + 1)
