"""Every mistake is one sentence on standard error, exit code 2, before a model loads: the tables of
`mistakes`."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from mft import cli
from mft.config import plugins
from mft.config.compose import compose_resolved
from mft.config.schema import freeze
from mft.console import credentials
from mft.launch import worker
from tests.commands.mistakes import BASE, FILES, rows, words


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with what the tables name: two tasks, parts of a run, a folder that is no adapter of ours."""
    work = tmp_path_factory.mktemp("mistakes")
    for task in ("alpha", "beta"):
        (work / task).mkdir()
        lines = [json.dumps({"prompt": f"{task} {i}", "answer": f"it is {i}"}) for i in range(30)]
        (work / task / "rows.jsonl").write_text("\n".join(lines) + "\n")
    for folder in ("empty", "half", "foreign", "pickled"):
        (work / folder).mkdir()
    freeze(compose_resolved(BASE), work / "half" / "config.yaml")
    (work / "half" / "metrics.jsonl").write_text('{"step": 1, "train/loss": 2.0}\n')
    (work / "foreign" / "adapter_config.json").write_text('{"peft_type": "PREFIX_TUNING"}')
    (work / "pickled" / "adapter_config.json").write_text('{"peft_type": "LORA"}')
    (work / "pickled" / "adapter_model.bin").write_bytes(b"")
    (work / "wrong.jinja").write_text("{% for message in %}")
    for name, content, _, _ in FILES:
        (work / name).parent.mkdir(parents=True, exist_ok=True)
        (work / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    return work


@pytest.fixture(autouse=True)
def nothing_starts(work: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    def started(folder: str, trace: object = None) -> None:
        raise AssertionError(f"the run in {folder} started")

    monkeypatch.setattr(worker, "run_job", started)
    monkeypatch.chdir(work)
    monkeypatch.setenv("MFT_CACHE", str(work / "cache"))
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    yield
    plugins._named.clear()
    credentials._remembered.clear()


def test_the_base_works(capsys: pytest.CaptureFixture[str]) -> None:
    cli.main(["train", *BASE, "--check"])
    assert not capsys.readouterr().err


def said(arguments: list[str], capsys: pytest.CaptureFixture[str], work: Path) -> str:
    with pytest.raises(SystemExit) as caught:
        cli.main(arguments)
    text = capsys.readouterr().err.replace(f"{work}/", "")
    assert caught.value.code == 2 and text.startswith("mft: ") and text.count("\n") == 1, text
    return text


ROWS = [(["train", *BASE], *row) for row in rows("mistakes_train.txt")]
ROWS += [([], *row) for row in rows("mistakes_verbs.txt")]


PARAMS = [
    # two of three are left to `make check-all`: each composes a config
    pytest.param(*row, id=row[1], marks=[pytest.mark.long] * (number % 3 > 0))
    for number, row in enumerate(ROWS)
]


@pytest.mark.parametrize(("before", "line", "parts"), PARAMS)
def test_a_wrong_command_line(
    before: list[str],
    line: str,
    parts: list[str],
    work: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    variables, arguments = words(line)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    text = said([*before, *arguments], capsys, work)
    assert parts and all(part in text for part in parts), text
    assert not (work / "multirun").exists()  # a sweep that does not start leaves nothing


@pytest.mark.parametrize(("arguments", "parts"), [row[2:] for row in FILES], ids=[row[0] for row in FILES])
def test_a_wrong_file(
    arguments: list[str], parts: list[str], work: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    text = said(["train", *BASE, *arguments], capsys, work)
    assert parts and all(part in text for part in parts), text


def test_the_tables_are_large_and_name_nothing_twice() -> None:
    lines = [(*before, line) for before, line, _ in ROWS]
    assert len(lines) + len(FILES) >= 350 and len(set(lines)) == len(lines)
