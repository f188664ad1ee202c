"""Passwords and keys: refused where they are written out, kept as written where the environment has them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from omegaconf import OmegaConf

from mft.config.build import build
from mft.config.compose import compose_resolved
from mft.config.inputs import identity
from mft.config.interpolations import check_variables
from mft.config.schema import freeze, load, plain
from mft.config.validate import check
from mft.console import credentials
from mft.console.credentials import hidden, written_out
from mft.errors import UserError
from tests import sweeping

S = "S3cr3tPlantedZX"


@pytest.fixture(autouse=True)
def nothing_remembered():
    yield
    credentials._remembered.clear()


@pytest.mark.parametrize(
    "uri",
    [
        f"http://:{S}@host",
        f"http://user:{S}@host:5000",
        f"http://{S}@host",
        f"http://user:a#{S}@host",
        f"http://user:a/{S}@host",
        f"http://user:a?{S}@host",
        f"http://h1,user:{S}@h2",
        f"postgresql://127.0.0.1:9/db?user=u&password={S}",
        f"postgresql://127.0.0.1/db?PassWord={S}",
        f"http://host/?api_key={S}",
        f"http://host/?a=1&access_token={S}",
        f"http://host/#token={S}",
        f"http://host/#{S}",
        f"http://host/?{S}",
        f"http://host/?p={S}",
        f"http://host/;password={S}",
        f"mssql+pyodbc:///?odbc_connect=DRIVER%3Dx%3BPWD%3D{S}",
        f"user:{S}@host/db",
        f"{S}@host",
        f"http:user:{S}@host",
        f"//user:{S}@host",
        f"http://user%3A{S}%40host",
        f"http://user%253A{S}%2540host",
        f"HTTP://USER:{S}@HOST",
        f"http://user:{S}＠host",
        f"http://host/?%70assword={S}",
        f"http://${{oc.env:USER}}:{S}@host",
        f"http://u:${{oc.env:PW,{S}}}@host",
        f"sqlite:////tmp/x.db?password={S}",
    ],
)
def test_what_an_address_has_written_out_is_refused_and_never_repeated(uri: str, tmp_path: Path) -> None:
    (tmp_path / "experiment").mkdir()
    (tmp_path / "experiment" / "it.yaml").write_text(
        "# @package _global_\n" + json.dumps({"tracking": {"mlflow": {"uri": uri}}}) + "\n"
    )
    quoted = uri.replace("\\", "\\\\")
    for given, folders in ((["experiment=it"], [tmp_path]), ([f"tracking.mlflow.uri='{quoted}'"], [])):
        with pytest.raises(UserError, match=r"tracking\.mlflow\.uri: the address holds") as caught:
            compose_resolved(["model=tiny", *given], folders)
        assert S not in str(caught.value)


@pytest.mark.parametrize(
    "key, value",
    [
        ("tracking.mlflow.uri", "http://host:5000"),
        ("tracking.mlflow.uri", "http://host:5000/base/path"),
        ("tracking.mlflow.uri", "sqlite:////home/me@work/x.db"),
        ("tracking.mlflow.uri", "postgresql://host/db?sslmode=require"),
        ("tracking.mlflow.uri", "http://${oc.env:U}:${oc.env:PW}@host"),
        ("tracking.mlflow.uri", "http://user:${oc.env:PW}@host"),
        ("tracking.mlflow.uri", "postgresql://host/db?password=${oc.env:PW}"),
        ("tracking.mlflow.uri", "${oc.env:URI}"),
        ("launch.rdzv_endpoint", "node0:29400"),
        ("launch.main_address", "10.0.0.1"),
        ("name", "me@work"),
        ("data.paths", "/home/me@work/a=b?c"),
        ("train.prompts", "hf:owner/name"),
        ("task.password", "{_target_: mft.data.task.Task, paths: [rows]}"),
        ("loss.min_loss_by_task.token", "1.5"),
        ("loss.weights.token", "0.5"),
        ("tracking.own.token", "false"),
        ("model.pad_token", "<pad>"),
    ],
)
def test_addresses_without_credentials_are_left_alone(key: str, value: str) -> None:
    assert not written_out(value, key)


@pytest.mark.parametrize(
    "key, value",
    [
        ("launch.rdzv_endpoint", f"user:{S}@node0:29400"),
        ("launch.main_address", f"user:{S}@node0"),
        ("model.path", f"https://user:{S}@hub/name"),
        ("data.paths", f"[https://host/rows.jsonl?token={S}]"),
        ("name", f"http://u:{S}@host"),
        ("+tracking.own", f"{{api_key: {S}}}"),
        ("+tracking.own", "{password: 12345678}"),
        ("+tracking.own.api_key", f"\u200b{S}"),
        ("+tracking.own.api_key ", f" {S}"),
    ],
)
def test_other_settings_are_judged_too(key: str, value: str) -> None:
    with pytest.raises(UserError, match=key.strip("+ ").replace(".", r"\.")) as caught:
        compose_resolved(["model=auto", f"{key}={value}" if value[0] in "[{" else f"{key}='{value}'"])
    assert S not in str(caught.value)


@pytest.mark.parametrize(
    "text",
    [
        f"http://user:a/{S}@host",
        f"cannot reach postgresql://u:{S}@db:5432/x?sslmode=require",
        f"https://host/?api_key={S}&x=1",
        f"user:{S}@host/db",
        f"http://h1,user:{S}@h2",
        f'{{"url": "http://u:{S}@h", "b": 1}}',
    ],
)
def test_messages_of_libraries_are_hidden(text: str) -> None:
    assert S not in hidden(text) and "***" in hidden(text)


ENV = ["tracking.mlflow.uri='http://${oc.env:MFT_T_USER}:${oc.env:MFT_T_PW}@127.0.0.1:9'", "tracking=mlflow"]


def config(tmp_path: Path, *overrides: str):
    (tmp_path / "rows").mkdir(exist_ok=True)
    (tmp_path / "rows" / "a.jsonl").write_text('{"prompt": "a", "answer": "b"}\n')
    given = ["model=tiny", f"cache_dir={tmp_path}", f"data.paths=[{tmp_path}/rows]", *overrides]
    return compose_resolved(given)


def test_values_of_the_environment_are_kept_as_written_and_read_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MFT_T_USER", "someone")
    monkeypatch.setenv("MFT_T_PW", S)
    monkeypatch.setenv("MFT_T_STEPS", "7")
    monkeypatch.setenv("MFT_T_DIR", str(tmp_path))
    more = ["train.max_steps=${oc.env:MFT_T_STEPS}", "name='of ${oc.env:MFT_T_USER} ${train.seed}'"]
    cfg = config(
        tmp_path, *ENV, *more, "tracking.mlflow.experiment=${name}", "output_dir='${oc.env:MFT_T_DIR}/o'"
    )
    check(cfg, world=1)
    freeze(cfg, tmp_path / "config.yaml")
    text = (tmp_path / "config.yaml").read_text()
    assert S not in text and "http://${oc.env:MFT_T_USER}:${oc.env:MFT_T_PW}@127.0.0.1:9" in text
    assert "max_steps: ${oc.env:MFT_T_STEPS}" in text and "of ${oc.env:MFT_T_USER} 42" in text
    assert S not in json.dumps(plain(cfg), default=str)
    read = load(tmp_path)
    assert build(read.tracking.mlflow, "tracking.mlflow").uri == f"http://someone:{S}@127.0.0.1:9"
    assert read.train.max_steps == 7 and read.name == "of someone 42" == read.tracking.mlflow.experiment
    assert Path(read.output_dir) == tmp_path / "o"
    assert hidden(f"{S} of someone") == "${oc.env:MFT_T_PW} of ${oc.env:MFT_T_USER}"
    same = identity(cfg, 1, [], {})
    monkeypatch.setenv("MFT_T_PW", "another")  # tracking is not part of a run's identity
    assert identity(load(tmp_path), 1, [], {}) == same
    monkeypatch.setenv("MFT_T_STEPS", "8")
    assert identity(load(tmp_path), 1, [], {}) != same
    monkeypatch.delenv("MFT_T_PW")
    with pytest.raises(UserError, match=r"MFT_T_PW is not set, and \$\{oc\.env:MFT_T_PW\} reads it"):
        check_variables(OmegaConf.load(tmp_path / "config.yaml"))
    with pytest.raises(
        UserError, match=r"tracking\.mlflow\.uri: the environment variable MFT_T_PW is not set"
    ):
        config(tmp_path, *ENV)


def test_a_refusal_shows_such_a_value_as_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys
) -> None:
    from mft.cli import main

    monkeypatch.setenv("MFT_T_PW", S)
    given = [
        "model=tiny",
        f"cache_dir={tmp_path}",
        "model.attention=${oc.env:MFT_T_PW}",
        f"data.paths=[{tmp_path}]",
    ]
    (tmp_path / "a.jsonl").write_text('{"prompt": "a", "answer": "b"}\n')
    with pytest.raises(SystemExit):
        main(["train", *given, "--check"])
    said = capsys.readouterr().err
    assert S not in said and "${oc.env:MFT_T_PW}" in said


@pytest.mark.slow
def test_no_file_and_no_line_of_a_run_has_the_password(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MFT_T_USER", "someone")
    monkeypatch.setenv("MFT_T_PW", S)
    work = sweeping.two_tasks(tmp_path / "work")
    code, said = sweeping.mft(work, "train", *sweeping.FAST, *ENV, "output_dir=run")
    assert code == 0 and S not in said, said
    texts = {path: path.read_bytes() for path in (work / "run").rglob("*") if path.is_file()}
    assert not [path for path, data in texts.items() if S.encode() in data]
    assert "${oc.env:MFT_T_PW}" in (work / "run" / "config.yaml").read_text()
    assert "${oc.env:MFT_T_USER}:${oc.env:MFT_T_PW}@" in (work / "run" / "mlflow.json").read_text()
    code, said = sweeping.mft(work, "train", *sweeping.FAST, *ENV, "--cfg", "job", "--resolve")
    assert code == 0 and S not in said and "${oc.env:MFT_T_PW}" in said
