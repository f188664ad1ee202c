"""Numbers outside of their range: one sentence that says the bounds."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest

from mft.config.schema import Launch
from mft.data.settings import DataSettings
from mft.errors import UserError, check_ranges, ranged
from mft.training.settings import TrainSettings
from tests.config.test_compose import message
from tests.config.test_conf import rows

SETTINGS = [("train", TrainSettings), ("launch", Launch), ("data", DataSettings)]
NUMBERS = [
    (f"{path}.{field.name}", cls)
    for path, cls in SETTINGS
    for field in dataclasses.fields(cls)
    if isinstance(field.default, int | float) and not isinstance(field.default, bool)
]


@pytest.mark.parametrize("key, cls", NUMBERS)
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -1, 10**30])
def test_every_number_of_the_settings_has_a_range(key: str, cls: type, value: float) -> None:
    with pytest.raises(UserError) as caught:
        check_ranges(cls(**{key.partition(".")[2]: value}), key.partition(".")[0])
    text = str(caught.value)
    assert text.startswith(f"{key}={value} must be ") and text.endswith(".") and "\n" not in text


def test_a_range_is_said_with_its_bounds() -> None:
    @dataclasses.dataclass
    class Some:
        share: float = ranged(0.5, min=0, below=1)
        count: int | None = ranged(None, min=1)
        free: float = 0.0

    for values, said in (
        ({"share": 1.0}, "x.share=1.0 must be at least 0 and less than 1."),
        ({"count": 0}, "x.count=0 must be at least 1, or null."),
        ({"count": 2**63}, f"x.count={2**63} must be at least 1 and at most {2**63 - 1}, or null."),
        ({"free": float("inf")}, "x.free=inf must be finite."),
    ):
        with pytest.raises(UserError) as caught:
            check_ranges(Some(**values), "x")  # type: ignore[arg-type]
        assert str(caught.value) == said
    with pytest.raises(UserError, match=f"at most {2**63 - 1}, or null"):
        check_ranges(Some(count=10**400), "x")  # larger than any float
    check_ranges(Some(), "x")


@pytest.mark.parametrize(
    "override, parts",
    [
        ("model.heads=0", ["model.heads=0 must be at least 1"]),
        ("peft.alpha=nan", ["peft.alpha"]),
        (
            "loss=coba loss.variant=papr",
            ["loss.variant='papr': must be one of paper, mftcoder", "did you mean paper?"],
        ),
        (
            "loss=task_focal loss.gamma_by_task={nope: 1}",
            ["loss.gamma_by_task.nope: unknown task", "Allowed: task"],
        ),
        (
            "loss=task_focal loss.gamma_by_task={task: nan}",
            ["loss.gamma_by_task.task=nan must be at least 0"],
        ),
        ("loss=dwa loss.window=0", ["loss.window=0 must be at least 1"]),
        ("loss=coba loss.tau=nan", ["loss.tau=nan must be greater than 0 and finite"]),
        ("+peft.rank=4 peft=full", ["peft.rank", "Fields: none"]),
        (
            "dist=zero2 dist.config={zero_optimization: {stag: 2}}",
            ["zero_optimization.stag", "did you mean stage?"],
        ),
    ],
)
def test_ranges_of_components(override: str, parts: list[str], tmp_path: Path) -> None:
    text = message(
        "model=tiny",
        f"cache_dir={tmp_path}",
        f"data.paths=[{rows(tmp_path / 'task')}]",
        *override.split(" ", 1),
    )
    assert all(part in text for part in parts), text
