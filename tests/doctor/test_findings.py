"""What is read without a child: versions, limits, folders, ports, variables, and what a config needs."""

from __future__ import annotations

import re
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from mft.config.compose import compose_resolved
from mft.doctor import environment, network, places, versions
from mft.doctor.finding import Finding, State
from mft.doctor.needs import Needs, needs_of


def named(findings: object, name: str) -> Finding:
    return next(finding for finding in findings if finding.name == name)  # type: ignore[attr-defined]


def test_versions_are_judged_by_the_declared_ranges(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert named(versions.findings(Needs()), "torch").state is State.ok
    for name, old in (("torch", "1.13"), ("bitsandbytes", "0.40")):
        folder = tmp_path / f"{name}-{old}.dist-info"
        folder.mkdir()
        (folder / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {old}\n")
    monkeypatch.syspath_prepend(tmp_path)
    torch = named(versions.findings(Needs()), "torch")
    assert torch.state is State.problem and "1.13 is outside the range >=2.6" in torch.found
    assert torch.cure == "pip install 'torch>=2.6'"
    assert named(versions.findings(Needs()), "bitsandbytes").state is State.note
    needed = named(versions.findings(Needs({"bitsandbytes": "peft=qlora"})), "bitsandbytes")
    assert needed.state is State.problem and "needed by peft=qlora" in needed.found


def test_the_limit_of_open_files() -> None:
    # in a process of its own, since this one may have more files open
    code = (
        "from mft.doctor import machine\n"
        "print(*[f'{f.state.name}: {f.found}; {f.cure}' for f in machine.findings() if f.name == 'open files'])"
    )
    for limit, state in ((100, "problem"), (1024, "note")):
        command = ["bash", "-c", f'ulimit -Sn {limit} && exec "$0" -c "$1"', sys.executable, code]
        said = subprocess.run(command, capture_output=True, text=True, check=True, timeout=300).stdout
        assert re.match(rf"{state}: at most {limit:,} \(ulimit -n\).*; ulimit -n \d+$", said)


def test_folders_are_written_to_and_not_made(tmp_path: Path) -> None:
    wanted = tmp_path / "not" / "there"
    fine = places.of_folder("output_dir", wanted, "output_dir=…")
    assert fine.state is State.ok and "GiB free" in fine.found and not wanted.parent.exists()
    for place in ("/proc/mft", "/proc/self/fd"):
        bad = places.of_folder("cache_dir", Path(place), "cache_dir=…")
        assert bad.state is State.problem and "cannot be written" in bad.found and "cache_dir=…" in bad.cure
    assert places.shared_memory(Path("/nowhere")).state is State.note


def test_a_cache_of_the_hub_that_cannot_be_written_matters_to_hub_names_alone(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("HF_HUB_CACHE", "/proc/mft")
    for needs, state in (({}, State.note), ({"hub": "model.path=owner/name"}, State.problem)):
        assert next(places.findings(None, Needs(needs))).state is state


def test_a_taken_port_is_a_problem() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        number = taken.getsockname()[1]
        assert network.port("127.0.0.1", number).state is State.problem
    assert network.port("127.0.0.1", number).state is State.ok


def test_the_hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HF_TOKEN_PATH", str(tmp_path / "none"))
    monkeypatch.delenv("HF_TOKEN", raising=False)
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    away = named(network.findings(None, Needs()), "hub")
    assert away.state is State.note and "HF_ENDPOINT does not answer" in away.found
    assert "a token is not there" in away.found and "127.0.0.1" not in away.found
    needed = named(network.findings(None, Needs({"hub": "model.path=owner/name"})), "hub")
    assert needed.state is State.problem
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    offline = named(network.findings(None, Needs()), "hub")
    assert "offline by HF_HUB_OFFLINE" in offline.found and "a token is there" in offline.found


def test_variables_are_named_and_secrets_are_not_shown() -> None:
    variables = {
        "MLFLOW_TRACKING_PASSWORD": "hunter2",
        "MLFLOW_TRACKING_URI": "http://intranet:5000",
        "MLFLOW_TRACKING_USERNAME": "me",
        "HF_TOKEN": "hf_x",
        "HF_ENDPOINT": "http://mirror",
        "MLFLOW_S3_ENDPOINT_URL": "http://s3",
        "ACCELERATE_USE_FSDP": "true",
        "CUDA_VISIBLE_DEVICES": "",
        "OMP_NUM_THREADS": "4",
        "RANK": "0",
        "HOME": "/root",
    }
    found = list(environment.findings(variables))
    assert [finding.name for finding in found] == sorted(variables.keys() - {"HOME"})
    shown = {finding.name: finding for finding in found}
    for name in ("MLFLOW_TRACKING_PASSWORD", "MLFLOW_TRACKING_URI", "MLFLOW_TRACKING_USERNAME", "HF_TOKEN"):
        assert shown[name].found == "set"
    assert shown["HF_ENDPOINT"].found == shown["MLFLOW_S3_ENDPOINT_URL"].found == "set"
    assert shown["OMP_NUM_THREADS"].found == "4"
    notes = [finding.name for finding in found if finding.state is State.note]
    assert notes == ["ACCELERATE_USE_FSDP", "CUDA_VISIBLE_DEVICES", "RANK"]


@pytest.mark.parametrize(
    ("overrides", "needed"),
    [
        (["dist=zero2", "peft=qlora"], {"deepspeed": "dist=zero2", "4 bits": "peft=qlora with 4 bits"}),
        (["dist=fsdp"], {"fsdp": "dist=fsdp"}),
        (["peft=qlora", "peft.bits=8"], {"8 bits": "peft=qlora with 8 bits"}),
        (["optimizer=adamw8bit"], {"adamw8bit": "optimizer=adamw8bit"}),
        (
            ["model.attention=flash_attention_2"],
            {"flash-attn": "model.attention=flash_attention_2"},
        ),
        (["train.precision=bf16"], {"bf16": "train.precision=bf16"}),
        (["model.path=owner/name"], {"hub": "model.path=owner/name"}),
        ([], {"mlflow": "tracking=mlflow", "fork server": "launch=processes", "torch": "every run"}),
        (["tracking=none", "launch=inline"], {"mlflow": "", "fork server": "", "deepspeed": "", "fsdp": ""}),
    ],
)
def test_what_a_config_needs(overrides: list[str], needed: dict[str, str]) -> None:
    needs = needs_of(compose_resolved(overrides))
    assert {name: needs.of(name) for name in needed} == needed
