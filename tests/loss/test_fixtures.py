"""The modes against reference numbers: see tests/loss/fixtures.py, which plays any other file of the same
kinds too."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.loss.fixtures import FIXTURES, KINDS, errors

GROUP = FIXTURES / "evaluate_2rank_k3.json"
"""Needs two ranks."""


@pytest.mark.parametrize("path", sorted({*FIXTURES.glob("*.json")} - {GROUP}), ids=lambda path: path.stem)
def test_every_error_is_within_its_tolerance(path: Path) -> None:
    found = errors(path)
    assert found.largest and not found.beyond()


@pytest.mark.slow
@pytest.mark.dist
def test_two_ranks_validate_by_tokens_too() -> None:
    found = errors(GROUP)
    assert found.largest and not found.beyond()


def test_every_kind_has_a_fixture_and_every_fixture_a_kind() -> None:
    assert {path.stem.split("_")[0] for path in FIXTURES.glob("*.json")} == set(KINDS)


def test_a_wrong_number_is_told_by_the_command(tmp_path: Path) -> None:
    record = json.loads((FIXTURES / "coba_k3_mixed.json").read_text())
    record["steps"][5]["weights"][0] += 1e-4
    (tmp_path / "coba_wrong.json").write_text(json.dumps(record))
    command = [
        sys.executable,
        "-m",
        "tests.loss",
        str(FIXTURES / "famo_k3.json"),
        str(tmp_path / "coba_wrong.json"),
    ]
    root = Path(__file__).parents[2]
    done = subprocess.run(command, capture_output=True, text=True, cwd=root, timeout=300)
    wrong = [line.split()[:2] for line in done.stdout.splitlines() if line.endswith("BEYOND")]
    assert done.returncode == 1 and wrong == [["coba_wrong", "weights"]], done.stderr
