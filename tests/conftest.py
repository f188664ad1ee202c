"""Fixtures that several parts of the tests share: small real things, made in code once a session."""

from __future__ import annotations

import gc
import os
import signal
import subprocess
import threading
from pathlib import Path

import pytest
from filelock import FileLock

from mft.model.tiny import Tiny
from tests import forked, sweeping

# A shell starts its background jobs with Ctrl-C ignored, which every process below would inherit: the tests
# that send it would then wait for nothing.
if threading.current_thread() is threading.main_thread():
    signal.signal(signal.SIGINT, signal.default_int_handler)

# pytest imports readline, which puts the size of a terminal into the environment of the workers; no test is to
# depend on it.
for name in ("COLUMNS", "LINES"):
    os.environ.pop(name, None)

# Neither is one to reach the hub, whether or not this machine could.
os.environ["HF_HUB_OFFLINE"] = "1"


def pytest_runtest_setup(item: pytest.Item) -> None:
    """Before the first test that may start ranks: their fork server, with what any of them imports."""
    if item.get_closest_marker("slow"):
        forked.start_server()


# A tenth of the time of the suite went into looking for cycles among the objects of torch and transformers, each
# time that a test had made a few hundred.
gc.set_threshold(20_000, 20, 20)


@pytest.fixture
def hub_may_be_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    """Lets the checks take a hub name for granted, as they do where the hub is reached when a model loads."""
    monkeypatch.delenv("HF_HUB_OFFLINE")


@pytest.fixture(scope="session")
def cache_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A cache folder of this session."""
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(scope="session")
def tiny(cache_dir: Path) -> Tiny:
    """The family of a random 2-layer llama (hidden 64, vocabulary 512)."""
    return Tiny(cache_dir=str(cache_dir))


@pytest.fixture(scope="session")
def tiny_folder(tiny: Tiny) -> Path:
    """Its checkpoint folder."""
    return tiny.folder()


@pytest.fixture
def tokenizer(tiny: Tiny):
    """Its byte-level tokenizer (EOS and pad token set, no chat template); a fresh one, so that a test may
    change it."""
    return tiny.tokenizer()


@pytest.fixture(scope="session")
def swept(tmp_path_factory: pytest.TempPathFactory, worker_id: str) -> Path:
    """A folder in which a real sweep has run: 2 losses x 2 seeds, side by side, in MLflow and TensorBoard.

    Made once for all processes of pytest-xdist.
    """
    root = tmp_path_factory.getbasetemp()
    root = root if worker_id == "master" else root.parent
    work = root / "swept"
    with FileLock(root / "swept.lock"):
        if not work.exists():
            sweeping.two_tasks(work)
            git = ["git", "-c", "user.name=mft", "-c", "user.email=mft@localhost"]
            for words in (
                ["init", "-q"],
                ["commit", "-q", "--allow-empty", "-m", "What the runs are tagged with"],
            ):
                subprocess.run([*git, *words], cwd=work, check=True, timeout=300)
            axes = ["loss=task_token_mean,coba", "train.seed=1,2", "optimizer.lr=2e-3", "train.eval_every=2"]
            trackers = ["tracking=[mlflow,tensorboard]", "tracking.tensorboard.dir=tb"]
            given = [*sweeping.FAST, *axes, *trackers, "tracking.mlflow.system_metrics=true", "launch.jobs=2"]
            code, said = sweeping.mft(work, "train", "-m", *given, "name=small")
            (work / "said.txt").write_text(said)
            assert code == 0, said
    return work
