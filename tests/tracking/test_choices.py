"""conf/tracking: one, several, none; every field listed; nothing heavy imported to look at them."""

import dataclasses
import subprocess
import sys
from pathlib import Path

import pytest
from hydra import compose, initialize_config_dir
from hydra.utils import get_class
from omegaconf import OmegaConf

from mft.errors import UserError
from mft.tracking.mlflow import Mlflow

CONF = Path(__file__).parents[2] / "conf"


@pytest.fixture
def tracking(tmp_path):
    def choose(*overrides):
        (tmp_path / "config.yaml").write_text(
            f"defaults: [{{tracking: mlflow}}, _self_]\nname: demo\nhydra: {{searchpath: ['file://{CONF}']}}\n"
        )
        with initialize_config_dir(str(tmp_path), version_base="1.3"):
            return OmegaConf.to_container(compose("config", list(overrides)), resolve=True)["tracking"]

    return choose


def test_default_several_and_none(tracking):
    assert list(tracking()) == ["mlflow"]
    assert tracking()["mlflow"]["experiment"] == "demo"
    both = tracking(
        "tracking=[mlflow,tensorboard]", "tracking.tensorboard.dir=x", "tracking.mlflow.uri=http://h:1"
    )
    assert (both["tensorboard"]["dir"], both["mlflow"]["uri"]) == ("x", "http://h:1")
    assert tracking("tracking=none") == {}


def test_every_field_is_listed_and_typed(tracking):
    for node in tracking("tracking=[mlflow,tensorboard]").values():
        cls = get_class(node.pop("_target_"))
        assert list(node) == [field.name for field in dataclasses.fields(cls)]
        OmegaConf.merge(OmegaConf.structured(cls), node)


def test_an_address_that_cannot_be_one(tmp_path):
    for uri in ("mlruns", "./x.db", "htp://host:5000", "file:///tmp/x", "sqlite://x.db"):
        with pytest.raises(UserError, match=r"tracking\.mlflow\.uri"):
            Mlflow(uri=uri)
    with pytest.raises(UserError, match="did you mean http"):
        Mlflow(uri="htp://me:secret@host")
    with pytest.raises(UserError) as told:
        Mlflow(uri="htp://me:secret@host")
    assert "secret" not in str(told.value)
    for uri in (None, "https://h", "sqlite:///x.db", "postgresql+psycopg2://a:b@h/d", "databricks"):
        Mlflow(uri=uri)


def test_looking_at_the_classes_imports_nothing_heavy():
    code = "import sys, mft.tracking.mlflow, mft.tracking.tensorboard, mft.training.plots\n"
    code += "print(sorted({'torch', 'mlflow', 'matplotlib', 'hydra', 'omegaconf'} & set(sys.modules)))"
    out = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=120
    ).stdout
    assert out.strip() == "[]"
