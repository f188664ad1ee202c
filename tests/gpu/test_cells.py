"""The cells of GPUs as their twins on a CPU, and on a GPU where one is here.

One call of the script plays what is selected of a list, as it would be called on a GPU machine; each test looks at
its cell's line.
"""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile, record_function

from benchmarks.gpu.cells import CELLS as SPEED
from benchmarks.gpu.profile import kernels
from tests.distributed.runs import worst
from tests.gpu.cells import CELLS
from tests.gpu.children import Cell, chosen
from tests.selection import selected

ROOT = Path(__file__).parent.parent.parent
MARKS = {"quick": [pytest.mark.slow], "long": [pytest.mark.long]}

needs_gpu = [pytest.mark.gpu, pytest.mark.long]
if not torch.cuda.is_available():
    needs_gpu.append(pytest.mark.skip(reason="no CUDA device is here"))


def twins(cells: Iterable[Cell]) -> list[Any]:
    return [pytest.param(cell.name, marks=MARKS[cell.twin], id=cell.name) for cell in cells if cell.twin]


def lines_of(module: str, *arguments: str) -> dict[str, dict[str, Any]]:
    """Returns the line of each cell that a call of the script has played."""
    command = [sys.executable, "-m", module, "--minutes", "60", *arguments]
    told = subprocess.run(command, cwd=ROOT, env=os.environ, capture_output=True, text=True, timeout=3700)
    found = [json.loads(line) for line in told.stdout.splitlines() if line.startswith("{")]
    assert found, told.stdout + told.stderr
    return {line["cell"]: line for line in found}


@pytest.fixture(scope="module")
def played(request: pytest.FixtureRequest) -> dict[str, dict[str, Any]]:
    """Lines of all cells whose twins are selected."""
    found: dict[str, dict[str, Any]] = {}
    for module, parameter in (("tests.gpu", "twin"), ("benchmarks.gpu", "tried")):
        if names := sorted(selected(request, parameter)):
            found |= lines_of(module, "--device", "cpu", "--small", "--only", *names)
    return found


@pytest.mark.parametrize("twin", twins(CELLS))
def test_a_twin_shows_on_a_cpu_what_is_to_be_shown(played: dict[str, Any], twin: str) -> None:
    assert played[twin]["passed"], played[twin]


@pytest.mark.parametrize("tried", twins(SPEED))
def test_the_benchmarks_run_in_small_shapes(played: dict[str, Any], tried: str) -> None:
    assert played[tried]["passed"], played[tried]


@pytest.mark.parametrize("name", [pytest.param(cell.name, marks=needs_gpu, id=cell.name) for cell in CELLS])
def test_on_a_gpu(name: str, on_gpu: dict[str, Any]) -> None:
    assert on_gpu[name]["passed"], on_gpu[name]


@pytest.fixture(scope="module")
def on_gpu(request: pytest.FixtureRequest) -> dict[str, dict[str, Any]]:
    """Lines of all selected cells, played on the GPU."""
    return lines_of("tests.gpu", "--only", *sorted(selected(request, "name")))


def test_cells_are_chosen_by_their_first_words_with_the_references_that_they_need() -> None:
    names = [cell.name for cell in chosen(CELLS, ["A1 lora", "A1"])]
    assert "A1 qlora pad" in names and "reference cpu single full fp32 pad" in names
    assert not [name for name in names if name.startswith(("A10", "A5"))]
    assert len({cell.name for cell in (*CELLS, *SPEED)}) == len(CELLS) + len(SPEED)


def test_what_ends_a_child_is_its_line_and_leaves_the_others(tmp_path: Path) -> None:
    """A child that raises, one that is killed, one whose time is up while it waits, one that is left."""
    script = (
        "import os, sys, time, json\n"
        "from pathlib import Path\n"
        "from tests.gpu.children import Cell, Found, Place, play\n"
        "cells = [Cell('raises', lambda place: 1 / 0), Cell('killed', lambda place: os.kill(os.getpid(), 9)),\n"
        "         Cell('late', lambda place: time.sleep(60), seconds=0.05),\n"
        "         Cell('missed', lambda place: Found({'x': 2.0}, ['x'])),\n"
        "         Cell('good', lambda place: Found({'x': 1, 'y': [float('nan'), float('inf')]}))]\n"
        "for line in play(cells, Place('cpu', True, Path(sys.argv[1]))): print(json.dumps(line))\n"
    )
    command = [sys.executable, "-c", script, str(tmp_path)]
    told = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True, timeout=120)
    lines = {line["cell"]: line for line in map(json.loads, told.stdout.splitlines())}
    assert [line["passed"] for line in lines.values()] == [False, False, False, False, True]
    assert lines["good"]["found"] == {"x": 1, "y": ["nan", "inf"]}  # JSON has no such numbers
    assert not list(tmp_path.iterdir())
    assert "ZeroDivisionError" in lines["raises"]["error"]
    assert "ended without a result" in lines["killed"]["error"]
    assert any("Timeout" in line for line in lines["late"]["log"]) and lines["late"]["seconds"] < 30
    assert lines["missed"]["missed"] == ["x"]


def test_a_parent_that_is_killed_leaves_no_child(tmp_path: Path) -> None:
    script = (
        "import os, sys, time\n"
        "from pathlib import Path\n"
        "from tests.gpu.children import Cell, Place, play\n"
        "def wait(place):\n"
        "    (place.folder / 'new').write_text(str(os.getpid()))\n"
        "    (place.folder / 'new').rename(place.folder / 'child')\n"
        "    time.sleep(60)\n"
        "list(play([Cell('waits', wait)], Place('cpu', True, Path(sys.argv[1]))))\n"
    )
    with subprocess.Popen([sys.executable, "-c", script, str(tmp_path)], cwd=ROOT) as parent:
        await_(lambda: (tmp_path / "child").exists())
        parent.kill()
    status = Path("/proc") / (tmp_path / "child").read_text() / "status"
    await_(lambda: not status.exists() or "State:\tZ" in status.read_text())


def await_(true: Callable[[], bool]) -> None:
    until = time.monotonic() + 30
    while not true():
        assert time.monotonic() < until
        time.sleep(0.05)


def test_a_value_that_is_no_number_is_the_worst() -> None:
    assert math.isnan(worst([1.0, math.nan, 2.0])) and worst([1.0, 3.0, 2.0]) == 3.0


def test_kernels_of_a_gpu_are_its_events_without_marked_stretches() -> None:
    """Given as the profiler has them on a GPU: a kernel, what the host calls it, and the optimizer's step."""

    def event(device: DeviceType, marked: bool) -> SimpleNamespace:
        return SimpleNamespace(device_type=device, is_user_annotation=marked)

    with profile(activities=[ProfilerActivity.CPU]) as seen, record_function("marked"):
        torch.ones(2)
    real = seen.key_averages()
    assert {"marked": True, "aten::ones": False}.items() <= {
        e.key: e.is_user_annotation for e in real
    }.items()
    assert not kernels(real)
    found = [event(DeviceType.CUDA, False), event(DeviceType.CPU, False), event(DeviceType.CUDA, True)]
    assert kernels(found) == found[:1]
