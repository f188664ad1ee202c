import dataclasses
import math
from pathlib import Path

import pytest
from hydra import compose, initialize_config_dir
from hydra.utils import instantiate
from omegaconf import OmegaConf

from mft.errors import UserError
from mft.optim.schedules import Constant, Cosine, CosineRestarts, Linear, Polynomial

CONF = Path(__file__).parents[2] / "conf"
NAMES = sorted(path.stem for path in (CONF / "scheduler").glob("*.yaml"))
DECAYS = [Cosine, CosineRestarts, Linear, Polynomial]


def curve(schedule, total=100, base_lr=1.0):
    return [schedule.lr(step, total, base_lr) for step in range(1, total + 1)]


@pytest.mark.parametrize("kind", DECAYS)
@pytest.mark.parametrize("total", [2, 3, 10, 100])
def test_from_the_peak_to_a_tenth_of_it_at_the_last_step(kind, total):
    values = curve(kind(warmup=0), total, 2e-4)
    assert values[0] == 2e-4 and values[-1] == pytest.approx(2e-5, rel=1e-12)
    assert all(2e-5 <= value <= 2e-4 for value in values)
    assert kind(warmup=0).lr(total + 5, total, 2e-4) == values[-1]


@pytest.mark.parametrize("kind", [*DECAYS, Constant])
@pytest.mark.parametrize("warmup", [10, 0.1])
def test_warm_up_is_a_line_that_begins_above_zero(kind, warmup):
    assert curve(kind(warmup=warmup))[:10] == pytest.approx([step / 10 for step in range(1, 11)])


def test_values_by_hand():
    assert Linear(0, 0.0).lr(51, 101, 1.0) == pytest.approx(0.5)
    assert Cosine(0, 0.0).lr(26, 101, 1.0) == pytest.approx(0.5 + math.sqrt(0.5) / 2)
    assert Polynomial(0, 0.2, power=2.0).lr(51, 101, 1.0) == pytest.approx(0.2 + 0.8 * 0.25)
    restarts = CosineRestarts(0, 0.0, cycles=2)
    assert restarts.lr(26, 101, 1.0) == pytest.approx(0.5)
    assert restarts.lr(51, 101, 1.0) == 1.0
    assert Constant().lr(1, 100, 3.0) == Constant().lr(100, 100, 3.0) == 3.0


def test_a_warm_up_longer_than_the_run_never_reaches_the_peak():
    assert curve(Cosine(warmup=100), 4) == pytest.approx([0.01, 0.02, 0.03, 0.04])


@pytest.mark.parametrize("kind", DECAYS)
def test_floor_above_the_peak_is_told(kind):
    with pytest.raises(UserError, match=r"scheduler\.min_lr is 0\.001, above the learning rate 0\.0001"):
        kind(min_lr=1e-3).lr(1, 10, 1e-4)


@pytest.mark.parametrize(
    ("make", "told"),
    [
        (lambda: Cosine(warmup=-1), r"scheduler\.warmup=-1"),
        (lambda: Cosine(warmup=2.5), r"scheduler\.warmup=2\.5"),
        (lambda: Linear(min_lr=-1e-5), r"scheduler\.min_lr=-1e-05"),
        (lambda: CosineRestarts(cycles=0), r"scheduler\.cycles=0"),
        (lambda: Polynomial(power=0), r"scheduler\.power=0"),
    ],
)
def test_impossible_values_are_told(make, told):
    with pytest.raises(UserError, match=told):
        make()


@pytest.mark.parametrize("name", NAMES)
def test_yaml_lists_every_field(name):
    with initialize_config_dir(str(CONF), version_base="1.3"):
        node = compose(overrides=[f"+scheduler={name}"]).scheduler
    schedule = instantiate(node)
    assert set(node) - {"_target_"} == {field.name for field in dataclasses.fields(schedule)}
    OmegaConf.merge(
        OmegaConf.structured(type(schedule)), {key: node[key] for key in node if key != "_target_"}
    )
    assert schedule.lr(10, 10, 1e-4) > 0
