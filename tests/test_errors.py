"""What the system refuses, as a sentence."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest

from mft.errors import UserError, is_full_disk, nearest_sibling, refused_by_system


def test_a_chain_of_errors_that_is_closed_is_walked_once() -> None:
    error = OSError(errno.EIO, os.strerror(errno.EIO))
    error.__cause__ = error
    assert not is_full_disk(error) and refused_by_system(error) is None


@pytest.mark.parametrize(
    ("number", "said"),
    [
        (errno.ENOSPC, "The disk is full: /here cannot be written. Make room"),
        (errno.EDQUOT, "The disk is full"),
        (errno.EMFILE, "/here: too many open files .* (ulimit -n); the same command resumes"),
        (errno.EFBIG, "/here: file too large .* (ulimit -f)"),
        (errno.EACCES, "/here: permission denied .* Make it writable for this user"),
        (errno.EROFS, "/here: permission denied .*Read-only file system"),
    ],
)
def test_a_limit_of_the_system_is_said_with_what_to_do(number: int, said: str) -> None:
    refusal = refused_by_system(OSError(number, os.strerror(number), "/here"))
    assert refusal is not None and refusal.exit_code == 1
    for part in said.split(" .*"):
        assert part.strip() in str(refusal)


def test_libraries_that_leave_out_the_number_are_understood_and_other_errors_are_none() -> None:
    refusal = refused_by_system(RuntimeError("I/O error: File too large (os error 27)"))
    assert refusal is not None and "ulimit -f" in str(refusal)
    refusal = refused_by_system(OSError("the store cannot be reached: Failed to init uv loop"))
    assert refusal is not None and "ulimit -n" in str(refusal)
    assert refused_by_system(ValueError("a defect")) is None
    assert refused_by_system(UserError("The disk is full: said already")) is None


def test_what_lies_beside_a_path_is_near_by_its_name_and_not_by_its_folder(tmp_path: Path) -> None:
    (tmp_path / "alpha").mkdir()
    assert nearest_sibling(tmp_path / "wrong.jinja") == ""
    assert nearest_sibling(tmp_path / "alhpa") == f"; did you mean {tmp_path / 'alpha'}?"
