"""What `mft plan` answers, end to end: from a config.json alone, in words and as JSON."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from mft import cli
from mft.batch import BatchSizes
from mft.estimate.memory import CONTEXT, USABLE
from mft.plan import gpus
from mft.plan.answer import answer
from mft.plan.gpus import GIB, device
from mft.plan.report import command
from tests.plan.configs import config_alone
from tests.tiny_runs import write_task


@pytest.fixture
def model(tmp_path: Path) -> str:
    return f"model.path={config_alone(tmp_path / 'model', num_hidden_layers=4)}"


def told(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    capsys.readouterr()
    cli.main(["plan", *arguments])
    return capsys.readouterr().out


def test_parameters_memory_and_time_of_a_config_alone(
    model: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    text = told(capsys, model, "peft=lora", "--gpu", "H100,4090", "tracking=none")
    assert max(map(len, text.splitlines())) <= 80
    # embedding and head, and in each layer attention (q and o, k and v), three matrices and two norms
    base = 2 * 32000 * 2048 + 2048 + 4 * (2 * 2048**2 + 2 * 2048 * 256 + 3 * 2048 * 5632 + 2 * 2048)
    adapters = 4 * 16 * (2 * (2048 + 2048) + 2 * (2048 + 256) + 3 * (2048 + 5632))
    assert f"{base + adapters:,}, of which {adapters:,} are trained" in text
    for words in (
        "peak of a step",
        "optimizer",
        "H100",
        "4090",
        "40% of its 989 TFLOP/s",
        "No task is chosen",
    ):
        assert words in text


def test_the_json_holds_the_same_in_bytes_and_seconds(
    model: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    task = write_task(tmp_path / "adding", 40)
    words = [model, f"data.paths=[{task}]", "plan.gpu=2xH100", "plan.tflops=100", "dist=ddp", "--json"]
    values = json.loads(told(capsys, *words, f"cache_dir={tmp_path / 'cache'}", "tracking=none"))
    (found,) = values["devices"]
    assert found["device"] == "2 x H100" and found["ranks"] == 2 and found["fits"] is True
    assert found["usable"] == pytest.approx(USABLE * 79.1 * GIB - CONTEXT)
    assert found["needed"] == max(found["peaks"].values())
    assert sum(found["parts"].values()) == pytest.approx(found["peaks"]["step"])
    assert found["seconds_per_step"] == pytest.approx(found["flops_per_step"] / 100e12)
    assert found["seconds"] == pytest.approx(found["seconds_per_step"] * values["data"]["steps"])
    assert list(values["data"]["tasks"]) == ["adding"] and found["advice"] is None


def test_what_does_not_fit_is_told_what_to_change(model: str, capsys: pytest.CaptureFixture[str]) -> None:
    text = told(capsys, model, "peft=full", "plan.gpu=5GiB", "tracking=none", "data.seq_length=512")
    line = next(line for line in text.splitlines() if "the first that fits" in line)
    assert f"mft train {model} peft=full tracking=none data.seq_length=512 " in line
    again = told(capsys, *line.partition("mft train ")[2].split(), "plan.gpu=5GiB", "--json")
    assert json.loads(again)["devices"][0]["fits"] is True


def test_what_is_offloaded_has_to_fit_into_the_host(model: str) -> None:
    given = [model, "peft=full", "tracking=none", "dist=zero3", "data.seq_length=256"]
    given += ["dist.offload_optimizer=true", "dist.offload_parameters=true"]
    (unknown,) = answer(given, [device("2x40GiB")], asked=True).outcomes
    plan = unknown.plan
    assert plan.fits and plan.on_host > 2 * sum(plan.memory.host.values()) > 0
    (small,) = answer(given, [device("2x40GiB")], asked=True, host=plan.on_host / 2).outcomes
    assert not small.plan.fits and small.plan.peak <= small.plan.room
    assert small.advice and small.advice[0].plan.fits
    moved_back = {override for advice in small.advice for override in advice.overrides}
    assert "dist.offload_optimizer=false" in moved_back


def test_an_automatic_micro_batch_is_the_largest_that_fits(model: str) -> None:
    given = [model, "tracking=none", "train.per_device_batch_size=auto", "train.global_batch_size=24"]
    small, large = answer(given, [device("6GiB"), device("H200")], asked=True).outcomes
    assert large.plan.case.sizes == BatchSizes(24, 1, 1)
    sizes = small.plan.case.sizes
    assert sizes.total == 24 and 1 <= sizes.per_device < 24 and small.plan.fits
    more = min(n for n in range(sizes.per_device + 1, 25) if 24 % n == 0)
    every = f"model.gradient_checkpointing={small.plan.every or 'false'}"
    by_hand = [*given[:2], every, f"train.per_device_batch_size={more}", given[-1]]
    (above,) = answer(by_hand, [device("6GiB")], asked=False).outcomes
    assert above.plan.peak > above.plan.room


def test_advice_replaces_what_was_given(model: str) -> None:
    found = answer([model, "peft=full", "tracking=none"], [device("3GiB")], asked=True)
    assert found.outcomes[0].advice
    line = command(found, ("peft=lora",))
    assert "peft=full" not in line and line.endswith("tracking=none peft=lora")


def test_where_nothing_fits_the_smallest_is_named(model: str, capsys: pytest.CaptureFixture[str]) -> None:
    given = ["peft=qlora", "plan.gpu=1.2GiB", "tracking=none", "data.seq_length=256"]
    text = told(capsys, model, *given, "model.gradient_checkpointing=true", "train.per_device_batch_size=1")
    assert "nothing fits" in text and "the smallest needs" in text and "mft train model.path=" in text


def test_of_common_gpus_one_that_fits_is_enough(model: str, monkeypatch: pytest.MonkeyPatch) -> None:
    found = answer([model, "peft=full", "tracking=none"], [device("3GiB"), device("H100")], asked=False)
    assert [outcome.plan.fits for outcome in found.outcomes] == [False, True]
    assert [outcome.advice for outcome in found.outcomes] == [None, None]
    assert found.shown is found.outcomes[1]


def test_a_time_is_told_where_the_speed_of_a_cpu_is_given_or_was_measured(model: str, tmp_path: Path) -> None:
    given = [model, "tracking=none", f"output_dir={tmp_path / 'outputs' / 'name' / 'run'}"]
    (unknown,) = answer(given, [device("cpu")], asked=False).outcomes
    assert unknown.seconds is None and unknown.plan.case.memory == gpus.machine_memory()
    (told,) = answer(given, [device("cpu")], asked=False, tflops=0.1).outcomes
    assert told.seconds == pytest.approx(told.plan.time.flops / 0.1e12)
    assert told.rate.words == "plan.tflops=0.1 a device"


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["plan.gup=H100"], "plan.gup=H100: unknown; did you mean plan.gpu?"),
        (["plan.gpu=H10"], "plan.gpu=H10: unknown GPU; did you mean H100?"),
        (["plan.tflops=0"], "--tflops needs a number greater than 0, got '0'."),
        (["--gpus=1"], "mft plan has no flag --gpus=1; did you mean --gpu?"),
    ],
)
def test_mistakes_are_answered_in_a_sentence(
    arguments: list[str], words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ended:
        cli.main(["plan", "model=tiny", *arguments])
    assert ended.value.code == 2 and words in capsys.readouterr().err
