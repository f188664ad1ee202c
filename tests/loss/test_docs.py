"""The code in docs/losses.md runs as it stands."""

from __future__ import annotations

import re
from pathlib import Path

from mft.config.build import component_class
from tests.loss.modes import MODES, config

PAGE = (Path(__file__).parents[2] / "docs" / "losses.md").read_text(encoding="utf-8")


def test_the_example_runs() -> None:
    (code,) = re.findall(r"```python\n(.*?)```", PAGE, re.S)
    exec(compile(code, "docs/losses.md", "exec"), {})


def test_every_mode_and_its_arguments_are_on_the_page() -> None:
    rows = {
        name: row
        for row in PAGE.splitlines()
        if row.startswith("| `mft.loss")
        for name in re.findall(r"\w+", row)
    }
    for mode in MODES:
        assert f"`{mode}`" in PAGE, mode
        kind = component_class(config(mode), "loss")
        fields = [name for name in config(mode) if name != "_target_"]
        assert re.findall(r"`([a-z_, ]+)`", rows[kind.__name__].split("|")[2]) == (
            [", ".join(fields)] if fields else []
        )
