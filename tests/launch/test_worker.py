"""One rank: what it refuses."""

from __future__ import annotations

from pathlib import Path

import pytest

from mft.errors import UserError
from mft.launch.worker import main, run_job


def test_a_folder_without_a_run_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"config\.yaml does not exist: give the folder of a run\."):
        run_job(str(tmp_path))
    with pytest.raises(SystemExit, match=r"^usage: python -m mft\.launch\.worker RUN_DIR"):
        main([])
