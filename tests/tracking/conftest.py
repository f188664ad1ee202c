"""The tests choose their stores, whatever the environment of the person who runs them says."""

import pytest


@pytest.fixture(autouse=True)
def no_store_of_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
