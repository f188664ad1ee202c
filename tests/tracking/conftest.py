"""The tests choose their stores, whatever the environment of the person who runs them says."""

import shutil
from pathlib import Path

import pytest

from mft.tracking.mlflow import Mlflow


@pytest.fixture(autouse=True)
def no_store_of_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("URI", "USERNAME", "PASSWORD", "TOKEN"):
        monkeypatch.delenv(f"MLFLOW_TRACKING_{name}", raising=False)


@pytest.fixture(scope="session")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a database, made once; experiments keep the tests apart."""
    folder = tmp_path_factory.mktemp("store")
    Mlflow(store=str(folder)).prepare()
    shutil.copy(folder / "mlflow.db", folder / "empty.db")  # to make one takes 7 s
    return folder


@pytest.fixture
def other_store(store: Path, tmp_path: Path) -> str:
    """The address of another, empty database."""
    return f"sqlite:///{shutil.copy(store / 'empty.db', tmp_path / 'other.db')}"
