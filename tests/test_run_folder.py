"""The run folder."""

from __future__ import annotations

from pathlib import Path

import pytest

from mft import run_folder
from mft.errors import UserError
from mft.model.tiny import Tiny


def test_a_folder_that_cannot_be_made_is_named_with_its_key(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"output_dir: the folder .*file/run cannot be made"):
        run_folder.lock(tmp_path / "file" / "run")
    with pytest.raises(UserError, match=r"cache_dir: the folder .*file/tiny cannot be made"):
        Tiny(cache_dir=str(tmp_path / "file")).folder()
