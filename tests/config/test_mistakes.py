"""Mistakes of a command line: one sentence before anything starts."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from mft import cli
from mft.config.compose import compose_resolved
from mft.config.other_trainers import HERE
from mft.config.overrides import of_hydra, replaced, with_output_dir
from mft.config.places import check_name
from mft.config.schema import Launch, config_dir
from mft.errors import UserError, check_ranges
from tests.config.test_conf import rows


@pytest.mark.parametrize(
    "override, parts",
    [
        ("data.paths=[~/x]", ["cannot be read", "~"]),
        ("train\u200b.max_steps=3", ["zero width space", "U+200B"]),
        ("peft=lo\u200bra", ["value contains zero width space"]),
        ("peft\u00a0=lora", ["no-break space"]),
        ("train.max_steps =3", ["U+0020"]),
        ("~train", ["~train", "cannot be removed"]),
        ("~launch", ["~launch", "launch=…"]),
        ("~output_dir", ["~output_dir", "cannot be removed"]),
        ("task=[5]", ["task=[5]", "Allowed: completion"]),
        ("peft=../dist/single", ["peft=../dist/single", "lora"]),
        ("@x=5", ["key before = is missing"]),
        ("hydra.searchpath=[nope]", ["nope is not a folder", "--config-dir"]),
        ("train=5", ["train=5", "must be a mapping"]),
        ("train=[1]", ["train=[1]", "must be a mapping"]),
        ("data.paths=['']", ["data.paths", "must be a path"]),
        ("train.precision=fp64", ["must be one of", "did you mean fp16?"]),
        ("~data", ["~data", "data=…"]),
        ("peft=[lora,full]", ["one option", "lora"]),
        ("hydra=null", ["hydra", "output_dir=…"]),
        ("hydra.run=null", ["hydra.run", "cannot be replaced"]),
        ("hydra.runtime.choices=null", ["cannot be replaced"]),
        ("name=/abs", ["name=/abs", "output_dir=…"]),
        ("name=a/../b", ["name=a/../b"]),
        (f"name={'x' * 300}", ["300 bytes", "255"]),
        (f"name={'x' * 5000}", ["5,000 bytes"]),
        (f"output_dir={'x' * 300}", ["output_dir=", "300 bytes"]),
        (f"data.paths=[{'y' * 5000}]", ["data.paths=", "5,000 bytes"]),
        ("launch.lost_seconds=-5", ["launch.lost_seconds=-5 must be at least 1"]),
        ("optimizer.betas=[0.9,0.95]", ["optimizer.beta1 and optimizer.beta2"]),
        ("learning_rate=1e-4", ["did you mean optimizer.lr?"]),
        ("train.per_device_train_batch_size=2", ["did you mean train.per_device_batch_size?"]),
    ],
)
def test_what_hydra_answers_with_a_traceback_or_in_its_own_words(override: str, parts: list[str]) -> None:
    def said() -> str:

        cfg = compose_resolved(["model=tiny", override])
        check_ranges(Launch(**{key: cfg.launch[key] for key in ("lost_seconds", "join_seconds")}), "launch")
        return ""

    with pytest.raises(UserError) as caught:
        said()
    text = str(caught.value)
    assert all(part in text for part in parts) and "\n" not in text, text


@pytest.mark.parametrize(
    "args, parts",
    [
        (["train", "'a'"], ["is not a valid override"]),
        (["train", ""], ["'' is not a valid override; use key=value"]),
        (["train", f"train.max_steps={'9' * 5000}"], ["train.max_steps=", "digits"]),
        (["train", "-m", "--cfg", "job", "peft=lora,full"], ["--cfg=job shows one run: leave out -m"]),
        (["train", "data/alpha"], ["did you mean data.paths=[data/alpha]?"]),
        (["train", "–dry-run"], ["en dash", "--dry-run"]),
        (["train", "--cfg", "peft=lora"], ["--cfg needs one of"]),
        (["train", "--cfg=jop"], ["did you mean job?"]),
        (["train", "--learning_rate=1e-4"], ["did you mean optimizer.lr=1e-4, without dashes?"]),
        (["train", "-m", "data.paths=[~/x],[x]"], ["cannot be read"]),
        (["train", "-m", "hydra.job=null"], ["cannot be replaced"]),
        (["train", "-m", f"name={'x' * 300}", "optimizer.lr=1,2"], ["300 bytes"]),
    ],
)
def test_a_mistake_exits_with_2(args: list[str], parts: list[str], capsys: pytest.CaptureFixture) -> None:
    with pytest.raises(SystemExit) as caught:
        cli.main(args)
    text = capsys.readouterr().err
    assert caught.value.code == 2 and text.count("\n") == 1, text
    assert text.startswith("mft: ") and all(part in text for part in parts), text


@pytest.mark.parametrize("text", [b"# @package _global_\nname: caf\xe9\n", bytes(range(256))])
def test_a_yaml_that_is_not_utf_8_is_named(text: bytes, tmp_path: Path) -> None:
    (tmp_path / "experiment").mkdir()
    (tmp_path / "experiment" / "mine.yaml").write_bytes(text)
    with pytest.raises(UserError, match=r"mine\.yaml:2: is not UTF-8 \(byte 0x"):
        compose_resolved(["experiment=mine"], [tmp_path])


@pytest.mark.parametrize(
    "defaults", ["lora", "\n  - mine", "\n  - 5", "\n  - override /peft: [a, b]", "{a: b}"]
)
def test_a_defaults_list_that_cannot_be_read_is_one_sentence(defaults: str, tmp_path: Path) -> None:
    (tmp_path / "experiment").mkdir()
    (tmp_path / "experiment" / "mine.yaml").write_text(f"# @package _global_\ndefaults: {defaults}\n")
    with pytest.raises(UserError) as caught:
        compose_resolved(["experiment=mine", "model=tiny"], [tmp_path])
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 500, str(caught.value)


def test_a_name_of_digits_reaches_its_component_as_text(tmp_path: Path) -> None:
    from mft.config.build import component
    from mft.config.validate import check

    paths = [f"cache_dir={tmp_path}", f"data.paths=[{rows(tmp_path / 'task')}]"]
    cfg = compose_resolved(
        ["model=tiny", *paths, "tracking.mlflow.experiment=2026", "tracking.mlflow.run_name=7"]
    )
    check(cfg, world=1)
    tracker = component(cfg, "tracking.mlflow")
    assert tracker.experiment == "2026" and tracker.run_name == "7"


def test_names_for_folders() -> None:
    for name in ("mft", "a/b", "größe", "x" * 255):
        check_name(name)
    for name in ("", ".", "a//b", "../a", "~/a", "a\nb"):
        with pytest.raises(UserError, match="name="):
            check_name(name)


def test_what_other_trainers_call_a_setting_is_known() -> None:
    table = (config_dir().parent / "docs" / "migrating.md").read_text().partition("## Other scripts")[0]
    theirs = [line.split("`")[1] for line in table.splitlines() if line.startswith("| `")]
    same = {
        "output_dir",
        "gradient_accumulation_steps",
        "weight_decay",
        "min_lr",
        "seq_length",
        "seed",
        "role_markers",
    }
    same |= {
        "early_stopping",
        "early_stopping_stall_num",
        "trust_remote_code",
        "per_device_eval_batch_size",
        "--distributed_type",
    }
    assert len(theirs) > 30 and set(theirs) - same <= set(HERE)
    cfg = compose_resolved(["model=tiny", "tracking=[mlflow,tensorboard]"])
    for name, here in HERE.items():
        for word in here.replace(" and ", " ").replace(" or ", " ").split():
            key = word.partition("=")[0]
            if "NAME" not in key and key != "peft.bits":
                group, _, rest = key.partition(".")
                assert group in cfg and (not rest or rest.split(".")[0] in cfg[group]), name


def test_settings_of_hydra_are_honoured_or_reported() -> None:
    assert with_output_dir(["hydra.run.dir=here", "peft=lora"]) == ["output_dir=here", "peft=lora"]
    with pytest.raises(UserError, match="both name the run folder"):
        with_output_dir(["hydra.run.dir=here", "output_dir=there"])
    assert of_hydra(["hydra.run.dir=x", "hydra.searchpath=[x]"], sweep=False) == []
    (note,) = of_hydra(["hydra.sweep.dir=x"], sweep=False)
    assert note.startswith("hydra.sweep.dir=x has no effect") and "output_dir" in note
    (note,) = of_hydra(["hydra.run.dir=x", "hydra.sweep.dir=x", "hydra.sweeper.n_trials=3"], sweep=True)
    assert note.startswith("hydra.run.dir=x has no effect") and "hydra.sweep.dir" in note
    assert replaced(["optimizer.lr=1", "peft=lora", "optimizer.lr=2", "peft=full"]) == [
        "optimizer.lr is set 2 times; optimizer.lr=2 is used.",
        "peft is set 2 times; peft=full is used.",
    ]
    cfg = compose_resolved(["model=tiny", "optimizer.lr=1", "peft=lora", "optimizer.lr=2", "peft=full"])
    assert cfg.optimizer.lr == 2 and cfg.choices.peft == "full"


def test_a_yaml_may_name_the_run_folder_as_hydra_does(tmp_path: Path) -> None:
    (tmp_path / "experiment").mkdir()
    (tmp_path / "experiment" / "mine.yaml").write_text(
        "# @package _global_\nhydra:\n  run:\n    dir: /runs/mine\n"
    )
    assert compose_resolved(["experiment=mine"], [tmp_path]).output_dir == "/runs/mine"
    assert compose_resolved(["experiment=mine", "output_dir=/other"], [tmp_path]).output_dir == "/other"


def test_a_folder_that_was_deleted_is_told(tmp_path: Path) -> None:
    gone = tmp_path / "gone"
    done = mft("runs", prefix=f"mkdir {gone}; cd {gone}; rmdir {gone};")
    assert done.returncode == 2 and done.stderr.count("\n") == 1 and "no longer exists" in done.stderr, (
        done.stderr
    )


# --- a terminal that takes little, or is gone ---


def mft(*args: str, shell: str = "", prefix: str = "", **variables: str) -> subprocess.CompletedProcess[str]:
    command = f'{prefix} "{sys.executable}" -c "from mft.cli import main; main()" {" ".join(args)} {shell}'
    environment = os.environ | variables
    return subprocess.run(
        ["bash", "-c", f"set -o pipefail; {command}"],
        capture_output=True,
        text=True,
        env=environment,
        timeout=300,
    )


@pytest.mark.parametrize(
    "shell, variables",
    [
        ("", {"PYTHONIOENCODING": "ascii", "LC_ALL": "C", "TERM": "dumb", "COLUMNS": "20"}),
        (">&-", {}),
        (">&- 2>&-", {}),
        ("| true", {}),
    ],
)
def test_output_that_is_ascii_or_closed_is_no_traceback(
    shell: str, variables: dict[str, str], tmp_path: Path
) -> None:
    done = mft("runs", str(tmp_path), shell=shell, **variables)
    assert "Traceback" not in done.stderr and "Error" not in done.stderr
    assert done.returncode in (0, 141)
    helped = mft("train", "--help", shell=shell, **variables)
    assert "Traceback" not in helped.stderr and "Error" not in helped.stderr


LONG = "x" * 5000


@pytest.mark.parametrize(
    "line",
    [
        ["show", LONG],
        ["runs", LONG],
        ["compare", LONG],
        ["merge", LONG],
        ["generate", LONG, "hi"],
        ["sweep", "resume", LONG],
        ["tracking", "sync", LONG],
        ["convert", LONG],
        ["train", "--config-dir", LONG],
        ["train", f"task={LONG}"],
        ["train", f"{LONG}=1"],
        [LONG],
    ],
)
def test_names_of_5000_characters_are_one_short_sentence(
    line: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as caught:
        cli.main(line)
    said = capsys.readouterr().err
    assert caught.value.code == 2
    assert len(said.splitlines()) == 1 and len(said) < 600, said


def test_a_circle_of_links_is_one_sentence(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "a").symlink_to(tmp_path / "b")
    (tmp_path / "b").symlink_to(tmp_path / "a")
    with pytest.raises(SystemExit) as caught:
        cli.main(["show", str(tmp_path / "a")])
    assert caught.value.code == 2 and str(tmp_path / "a") in capsys.readouterr().err


def test_an_unknown_key_of_hydra_is_not_looked_for_in_the_config() -> None:
    with pytest.raises(UserError, match=r"^hydra\.launcher\.x: unknown; Hydra has"):
        compose_resolved(["model=tiny", "hydra.launcher.x=1"])
