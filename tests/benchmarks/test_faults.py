"""A sample of the campaign of faults, and proof that its judge sees what it is to see."""

from __future__ import annotations

import functools
import json
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from benchmarks.faults import campaign, case, judge
from benchmarks.faults.case import Case
from benchmarks.faults.kinds import KINDS, Kind
from benchmarks.faults.processes import prepare_server
from benchmarks.faults.setups import STEPS, Bench, Setup, dealt
from tests.selection import long

pytestmark = [pytest.mark.slow, pytest.mark.dist]

BY_NAME = {kind.name: kind for kind in KINDS}
ALONE, PAIR = Setup(), Setup("ddp", "lora", "pack", "coba")


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory) -> Bench:
    prepare_server()
    return Bench(tmp_path_factory.mktemp("faults"))


TEN = [
    long("kill launcher", PAIR),
    ("kill rank", PAIR),
    long("kill group", ALONE),
    ("signal launcher", ALONE),
    long("signal rank", PAIR),
    ("damage newest checkpoint", ALONE),
    long("damage all checkpoints", ALONE),
    long("damage metrics", ALONE),
    long("few file handles", ALONE),
    ("read-only folder", ALONE),
]
"""One of each way of striking is played by every `make test`."""


@pytest.mark.parametrize(("name", "setup"), TEN)
def test_a_fault_loses_nothing(bench: Bench, name: str, setup: Setup) -> None:
    result = campaign.play(bench, 1, 1, BY_NAME[name], setup=setup)
    assert result.good, f"{result.outcome}: {result.struck}: {result.detail}"


@pytest.mark.long
@pytest.mark.parametrize("number", range(1, 31))
def test_a_tenth_of_the_campaign_loses_nothing(bench: Bench, number: int) -> None:
    kinds = [kind for kind in KINDS if kind.possible()]
    result = campaign.play(bench, 2, number, campaign.kind_of(2, number, kinds))
    assert result.good, f"{result.outcome}: {result.struck}: {result.detail}\n{result.repeat}"


def finished(case: Case) -> None:
    case.bench.finished(case.setup, case.work)
    case.codes.append(0)


def sound(case: Case) -> None:
    """A run that nothing happened to."""
    finished(case)


def other_weights(case: Case) -> None:
    finished(case)
    (path,) = case.run.glob("final/*.safetensors")
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)


def other_row(case: Case) -> None:
    finished(case)
    path = case.run / "metrics.jsonl"
    lines = path.read_text().splitlines()
    lines[3] = json.dumps(json.loads(lines[3]) | {"lr": 0.5})
    path.write_text("\n".join(lines) + "\n")


def row_missing(case: Case) -> None:
    finished(case)
    path = case.run / "metrics.jsonl"
    path.write_text("".join(path.read_text().splitlines(keepends=True)[:-1]))


def intact_row_lost(case: Case) -> None:
    """One row was destroyed; another one is missing, too."""
    finished(case)
    path = case.run / "metrics.jsonl"
    rows = path.read_text().splitlines(keepends=True)
    case.losable, case.intact = True, judge.rows(case.run)[1:]
    path.write_text("".join(rows[2:]))


def tokenizer_missing(case: Case) -> None:
    finished(case)
    (case.run / "final" / "tokenizer.json").unlink()


def losses_missing(case: Case) -> None:
    finished(case)
    (case.run / "sample_losses" / f"valid-{STEPS}.parquet").unlink()


def other_summary(case: Case) -> None:
    finished(case)
    path = case.run / "summary.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"tokens": 1}))


def sleeping(case: Case) -> None:
    case.end(case.start(prepare=functools.partial(time.sleep, 100)))


def with_a_child(case: Case) -> None:
    case.end(case.start(["--version"], functools.partial(subprocess.Popen, ["sleep", "100"])))


def failing(case: Case) -> None:
    case.end(case.start(["--version"], functools.partial(int, "a defect")))


def unsaid(case: Case) -> None:
    finished(case)
    case.expects.append("what nobody says")


def refused(case: Case) -> None:
    case.more.append("optimizer.lr=-1")


@pytest.mark.parametrize(
    ("strike", "outcome"),
    [
        (sound, "ended"),
        (other_weights, "LOST"),
        (other_row, "LOST"),
        (row_missing, "LOST"),
        (intact_row_lost, "LOST"),
        (tokenizer_missing, "LOST"),
        (losses_missing, "LOST"),
        (other_summary, "LOST"),
        (refused, "LOST"),
        (sleeping, "HUNG"),
        (with_a_child, "LEFT A PROCESS"),
        (failing, "TRACEBACK"),
        (unsaid, "UNTOLD"),
    ],
)
def test_the_judge_sees_what_went_wrong(
    bench: Bench, monkeypatch: pytest.MonkeyPatch, strike: Callable[[Case], None], outcome: str
) -> None:
    if outcome in ("HUNG", "LEFT A PROCESS"):
        monkeypatch.setattr(case, "HANG_SECONDS", 2.0)
        monkeypatch.setattr(case, "LEAVE_SECONDS", 1.0)
    result = campaign.play(bench, 1, 1, Kind("control", strike), setup=ALONE)
    assert result.outcome == outcome, result.detail
    assert ("control" in campaign.table([result])) and (
        result.repeat in campaign.table([result])
    ) != result.good


def test_faults_are_a_function_of_seed_and_number(tmp_path: Path) -> None:
    deck = [campaign.kind_of(7, number, KINDS).name for number in range(1, 400)]
    assert deck == [campaign.kind_of(7, number, KINDS).name for number in range(1, 400)]
    assert set(deck) == set(BY_NAME) and deck != [campaign.kind_of(8, n, KINDS).name for n in range(1, 400)]
    assert dealt(7) == dealt(7) != dealt(8)
    result = campaign.Result(
        1, "kill rank", "LOST", "struck", "detail", "single", False, [1], [0.9], 1.0, "again"
    )
    for _ in range(2):
        campaign.record(result, tmp_path / "record.jsonl")
    rows = [json.loads(line) for line in (tmp_path / "record.jsonl").read_text().splitlines()]
    assert [row["outcome"] for row in rows] == ["LOST", "LOST"]
