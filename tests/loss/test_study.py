"""experiment=loss_study: all modes are in it, and it runs as the docs say (here shortened)."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml

from benchmarks import loss_weights
from mft.config.schema import config_dir
from tests.loss.modes import MODES
from tests.sweeping import mft
from tests.tiny_runs import write_task

STUDY = yaml.safe_load((config_dir() / "experiment" / "loss_study.yaml").read_text(encoding="utf-8"))


def test_it_has_every_mode_two_learning_rates_and_two_seeds() -> None:
    axes = {name: str(values).split(",") for name, values in STUDY["hydra"]["sweeper"]["params"].items()}
    assert sorted(axes["loss"]) == MODES
    assert len(axes["optimizer.lr"]) == len(axes["train.seed"]) == 2
    shares = [task["share"] for task in STUDY["task"].values()]
    assert max(shares) >= 4 * min(shares)


@pytest.mark.slow
@pytest.mark.long
def test_it_runs_and_its_picture_is_drawn(tmp_path: Path) -> None:
    for number, name in enumerate(STUDY["task"]):
        write_task(tmp_path / "cache" / "demo" / "tasks" / name, 80, longest=3 + 3 * number)
    short = (
        "optimizer.lr=4e-3",
        "train.seed=1",
        "train.max_steps=3",
        "train.eval_every=3",
        "train.log_every=1",
    )
    code, said = mft(tmp_path, "train", "-m", "experiment=loss_study", "loss=coba,uncertainty", *short)
    assert code == 0, said
    (sweep,) = (path.parent for path in (tmp_path / "multirun" / "loss_study").glob("*/sweep.json"))
    summaries = [json.loads(path.read_text()) for path in sweep.glob("*/summary.json")]
    assert len(summaries) == 2 and all(len(s["best_by_task"]) == 5 for s in summaries)
    code, said = mft(tmp_path, "compare", str(sweep), "--metric", "worst", "--group-by", "loss")
    assert code == 0 and "uncertainty" in said
    loss_weights.main(sweep, tmp_path / "weights.png", ["train.seed=1"])
    assert (tmp_path / "weights.png").stat().st_size > 5_000
