"""The log file of a rank: what was on the terminal, line by line."""

from __future__ import annotations

import io
from pathlib import Path

import pytest
from rich.console import Console
from rich.progress import Progress

from mft.launch.rank_log import LineLog, tee, written_to


class Screen(io.StringIO):
    """A stream that says it is a terminal."""

    def isatty(self) -> bool:
        return True


def test_a_log_keeps_what_a_progress_bar_does_not_draw_over(tmp_path: Path) -> None:
    screen, log = Screen(), LineLog(tmp_path / "log")
    screen.write("")
    tee(screen, log)
    console = Console(file=screen, force_terminal=True, width=60)
    with Progress(console=console, auto_refresh=False) as bar:
        task = bar.add_task("training", total=200)
        for step in range(200):
            bar.update(task, completed=step + 1)
            bar.refresh()
            if step % 50 == 0:
                console.print(f"[bold]step {step}[/]")
    log.close()
    lines = (tmp_path / "log").read_text().splitlines()
    assert [line for line in lines if line.startswith("step")] == [
        "step 0",
        "step 50",
        "step 100",
        "step 150",
    ]
    assert len([line for line in lines if line.startswith("training")]) == 1 and "100%" in lines[-1]
    assert "\x1b" in screen.getvalue() and "\x1b" not in "".join(lines)


def test_long_output_and_lines_started_again(tmp_path: Path) -> None:
    log = LineLog(tmp_path / "log")
    for number in range(1000):
        log.write(f"{number}\r\n")
    log.write("10 %\r20 %")
    log.write("\r30 %\nend")
    log.close()
    assert (tmp_path / "log").read_text().splitlines() == [*map(str, range(1000)), "30 %", "end"]


def test_rank_0_writes_to_both_and_a_traceback_to_the_log(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(ValueError), written_to(tmp_path / "rank0.log", 0):
        print("printed")
        raise ValueError("the cause")
    print("afterwards")
    assert capsys.readouterr().out == "printed\nafterwards\n"
    text = (tmp_path / "rank0.log").read_text()
    assert text.startswith("printed\n") and "ValueError: the cause" in text and "afterwards" not in text
