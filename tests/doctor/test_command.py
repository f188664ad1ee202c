"""`mft doctor` as a person runs it: lines, JSON, exit codes, and no secret in any of it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from mft.cli import main
from tests.sweeping import mft, two_tasks

QUICK = ["tracking=none", "--patience", "0.05"]
"""No attempt is waited for: what they find is tested in test_attempts.py."""


def test_every_kind_of_line_in_json_and_the_exit_code(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MLFLOW_TRACKING_PASSWORD", "hunter2")
    with pytest.raises(SystemExit) as ended:
        main(["doctor", *QUICK, "--json", "output_dir=/proc/mft/run", "peft=qlora"])
    said = capsys.readouterr().out
    report = json.loads(said)
    assert ended.value.code == 1 and set(report) == {"format", "problems", "findings"}
    assert all(set(f) == {"part", "name", "state", "found", "cure"} for f in report["findings"])
    parts = [*dict.fromkeys(finding["part"] for finding in report["findings"])]
    assert parts == ["versions", "machine", "places", "environment", "network", "abilities", "config"]
    problems = [finding for finding in report["findings"] if finding["state"] == "problem"]
    assert report["problems"] == len(problems) and all(finding["cure"] for finding in problems)
    assert "output_dir" in {finding["name"] for finding in problems}
    four = next(finding for finding in report["findings"] if finding["name"] == "4 bits (NF4)")
    assert four["state"] == "problem" and "needed by peft=qlora" in four["found"]
    assert problems[-1]["name"] == "your config" and "hunter2" not in said
    assert not list(tmp_path.iterdir())


def test_a_config_that_train_refuses_is_a_problem_and_one_that_cannot_be_composed_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys
) -> None:
    monkeypatch.chdir(two_tasks(tmp_path))
    with pytest.raises(SystemExit) as ended:
        main(["doctor", *QUICK, "debug=fast", "data.paths=[docs,cods]", f"cache_dir={tmp_path / 'cache'}"])
    said = " ".join(capsys.readouterr().out.split())
    assert ended.value.code == 1 and "cods does not exist" in said
    with pytest.raises(SystemExit) as ended:
        main(["doctor", *QUICK, "peft=loar"])
    assert ended.value.code == 2 and "did you mean lora" in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.dist
def test_everything_works_on_the_machine_of_the_tests(tmp_path: Path) -> None:
    work = two_tasks(tmp_path)
    code, said = mft(work, "doctor", "debug=fast", "data.paths=[docs,code]", "peft=qlora", "dist=fsdp")
    assert code == 0, said
    assert "what `mft train` expects" in said and "nothing that it needs is missing here" in said
    for line in ("FSDP2", "4 bits (NF4)", "8 bits", "adamw8bit", "gloo, fork server", "DeepSpeed"):
        assert [row for row in said.splitlines() if row.startswith("ok") and line in row], said
