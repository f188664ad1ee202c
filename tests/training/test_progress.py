"""What a person reads while a run goes on."""

from __future__ import annotations

import pytest

from mft.console.tables import settings_table
from mft.training.progress import Terminal, losses_table


def test_a_task_with_test_rows_alone_has_its_line(capsys: pytest.CaptureFixture[str]) -> None:
    valid, test = {"a": 2.0, "b": 1.0}, {"a": 3.0, "c": 5.0}
    Terminal(list("abc")).show(losses_table(valid, valid, valid, 4, test, 4))
    rows = [line.split("│")[1:-1] for line in capsys.readouterr().out.splitlines() if line.startswith("│")]
    shown = {name.strip(): last.strip() for name, *_, last in rows}
    assert shown == {"a": "3.000", "b": "nan", "c": "5.000", "mean": "4.000"}


def test_names_in_brackets_are_shown_as_they_are(capsys: pytest.CaptureFixture[str]) -> None:
    name, losses = "docs [old]", {"docs [old]": 1.0, "more": 2.0}
    progress = Terminal(list(losses))
    progress.start(0, 1)
    progress.validated(1, losses)
    progress.report(1, {"train/loss": 1.5, "speed/tokens_per_second": 9.0, f"train/loss/{name}": 1.0})
    progress.show(losses_table(losses, losses, losses, 1))
    progress.show(settings_table([(name, f"runs/{name}")], f"of {name}"))
    progress.show(f"a note on {name}")
    progress.close()
    lines = capsys.readouterr().out.splitlines()
    shown = [line for line in lines if "docs" in line]
    assert len(shown) == 6 and all(name in line for line in shown), shown
    assert lines[0].startswith("step 1/1  valid 1.500  docs [old] 1.000 · more 2.000")


def test_a_line_that_is_copied_is_not_broken(capsys: pytest.CaptureFixture[str]) -> None:
    address, command = f"http://127.0.0.1:5000/#/{'x' * 300}", " ".join(["mft", "generate", *"a" * 200])
    Terminal([]).show_pasted([("ask it", command), ("tracker", address)], "finished [after] 6 steps")
    title, *lines = capsys.readouterr().out.splitlines()
    assert title == "finished [after] 6 steps"
    assert [line.split(maxsplit=k) for line, k in zip(lines, (2, 1), strict=True)] == [
        ["ask", "it", command],
        ["tracker", address],
    ]
