"""Secrets planted wherever a user may have them are in no file, no store and no line that mft leaves."""

from __future__ import annotations

import base64
import subprocess
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import quote, quote_plus

import pytest

from mft import cli
from tests import sweeping

PLANTED = {
    "user": "Us3r/Planted+A",
    "password": "Passw0rd/Planted+B",
    "api key": "Ap1Key/Planted+C",
    "query": "Qu3ryToken/Planted+D",
    "MLFLOW_TRACKING_PASSWORD": "MlflowPw/Planted+E",
    "MLFLOW_TRACKING_TOKEN": "MlflowT0ken/Planted+F",
    "HF_TOKEN": "hf_Planted/Token+G",
    "proxy": "Pr0xy/Planted+H",
    "git": "ghp_Planted/Token+I",
    "written out": "Writt3nOut/Planted+J",
}
"""Where it is planted → the secret; / and + make its forms in an address differ from it."""

PLUGIN = """
import logging
from dataclasses import dataclass
from mft.loss.means import TaskTokenMean
from mft.tracking.base import Tracker

@dataclass
class Keeper(Tracker):
    api_key: str = ""
    def open(self, run_dir, config, tags, step=0):
        logging.getLogger(__name__).warning("opened with %s", self.api_key)
    def log(self, step, values):
        raise RuntimeError(f"no access with {self.api_key}")

@dataclass
class Breaks(TaskTokenMean):
    api_key: str = ""
    def share(self, *arguments):
        raise RuntimeError(f"no access to https://u:{self.api_key}@host with {self.api_key}")
"""
"""A tracker and a loss that tell their keys to whoever listens."""

YAMLS = {
    "tracking/keeper.yaml": "# @package tracking.keeper\n_target_: keeper.Keeper\napi_key: ${oc.env:T_KEY}\n",
    "loss/breaks.yaml": "_target_: keeper.Breaks\napi_key: ${oc.env:T_KEY}\n",
}


def forms(secret: str) -> Iterator[bytes]:
    """Yields a secret as it may stand in a file: raw, in an address, in base64 at each of three offsets."""
    yield from {text.encode() for text in (secret, quote(secret), quote(secret, safe=""), quote_plus(secret))}
    for before in range(3):
        coded = base64.b64encode(b"\0" * before + secret.encode()).rstrip(b"=")
        yield coded[-(-before * 8 // 6) : -1]  # without the letters that the neighbours decide as well


def found(data: bytes) -> list[str]:
    return [place for place, secret in PLANTED.items() if any(form in data for form in forms(secret))]


def test_every_form_is_recognised() -> None:
    for place, secret in PLANTED.items():
        basic = base64.b64encode(f"user:{secret}".encode())
        for data in (f"x {secret} y".encode(), quote(f"http://u:{secret}@h", safe="").encode(), basic):
            assert found(data) == [place]


@pytest.mark.slow
def test_what_is_planted_is_nowhere_afterwards(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    work = sweeping.two_tasks(tmp_path / "work")
    (work / "keeper.py").write_text(PLUGIN)
    for name, text in YAMLS.items():
        (work / "own" / name).parent.mkdir(parents=True)
        (work / "own" / name).write_text(text)
    remote = f"https://oauth2:{quote(PLANTED['git'], safe='')}@127.0.0.1:9/private.git"
    who = ["-c", "user.name=mft", "-c", "user.email=mft@localhost"]
    for words in (
        ["init", "-q"],
        ["remote", "add", "origin", remote],
        ["commit", "-qm", "x", "--allow-empty"],
    ):
        subprocess.run(["git", *who, *words], cwd=work, check=True, timeout=300)
    proxy = f"http://someone:{quote(PLANTED['proxy'], safe='')}@127.0.0.1:9"
    address = f"http://{quote(PLANTED['user'], safe='')}:{quote(PLANTED['password'], safe='')}@127.0.0.1:9"
    for name, value in {
        "T_KEY": PLANTED["api key"],
        "T_ADDRESS": f"{address}/?token={quote(PLANTED['query'], safe='')}",
        "HTTP_PROXY": proxy,
        "HTTPS_PROXY": proxy,
        "MLFLOW_TRACKING_USERNAME": "someone",
        **{name: PLANTED[name] for name in PLANTED if name.isupper() or name == "HF_TOKEN"},
    }.items():
        monkeypatch.setenv(name, value)
    own = ["--plugin", "keeper", "--config-dir", "own"]
    stores = ["tracking=[mlflow,tensorboard,keeper]", "tracking.tensorboard.dir=tb"]
    away = ["tracking=[mlflow,keeper]", "tracking.mlflow.uri='${oc.env:T_ADDRESS}'"]
    axis = ["-m", "train.seed=1,2", "launch.jobs=2"]
    commands = [
        (0, ["train", *own, *sweeping.FAST, *stores, "output_dir=run", "launch=inline"]),
        (1, ["train", *own, *sweeping.FAST, *away, "loss=breaks", "output_dir=failed", "launch=inline"]),
        (0, ["train", *own, *sweeping.FAST, *stores, *axis, "hydra.sweep.dir=sweep", "train.eval_every=2"]),
        (0, ["show", "failed"]),
        (0, ["compare", "sweep", "--markdown", "table.md", "--csv", "table.csv"]),
        (2, ["tracking", "sync", "failed"]),
        (0, ["train", *own, *sweeping.FAST, *away, "--cfg", "job", "--resolve"]),
    ]
    said = ""
    for expected, words in commands:
        code, output = sweeping.mft(work, *words)
        assert code == expected, output
        assert not found(output.encode()), (words, output)
        said += output
    assert "opened with ${oc.env:T_KEY}" in said and "no access" in said  # they did tell
    files = [path for path in work.rglob("*") if path.is_file() and path != work / ".git" / "config"]
    names = {path.name for path in files}
    assert {"mlflow.db", "report.html", "table.md", "config.yaml", "rank0.log"} <= names
    assert any(name.startswith("events.out.tfevents") for name in names)
    assert not {str(path): places for path in files if (places := found(path.read_bytes()))}


@pytest.mark.parametrize(
    "override",
    [
        "+tracking.keeper.api_key={}",
        "+tracking.keeper.token={}",
        "+tracking.keeper.db_password='{}'",
        "model.path=https://someone:{}@host/name",
        "data.paths=['https://host/rows.jsonl?token={}']",
    ],
)
def test_what_is_written_out_is_refused_and_not_repeated(
    override: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as caught:
        cli.main(["train", "model=auto", override.format(PLANTED["written out"])])
    text = capsys.readouterr().err
    assert caught.value.code == 2 and not found(text.encode()) and "${oc.env:NAME}" in text
