"""Mistakes of a command line: one sentence before anything starts; settings without effect: one line each."""

from __future__ import annotations

import dataclasses
import os
import subprocess
import sys
from pathlib import Path

import pytest

from mft import cli
from mft.config.compose import compose_resolved
from mft.config.inert import given_keys, rules, without_effect
from mft.config.other_trainers import HERE
from mft.config.overrides import group_options, of_hydra, replaced, with_output_dir
from mft.config.places import check_name
from mft.config.schema import Launch, config_dir
from mft.data.settings import DataSettings
from mft.errors import UserError, check_ranges, ranged
from mft.training.settings import TrainSettings
from tests.config.test_compose import message
from tests.config.test_conf import rows

SETTINGS = [("train", TrainSettings), ("launch", Launch), ("data", DataSettings)]
NUMBERS = [
    (f"{path}.{field.name}", cls)
    for path, cls in SETTINGS
    for field in dataclasses.fields(cls)
    if isinstance(field.default, int | float) and not isinstance(field.default, bool)
]


@pytest.mark.parametrize("key, cls", NUMBERS)
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -1, 10**30])
def test_every_number_of_the_settings_has_a_range(key: str, cls: type, value: float) -> None:
    with pytest.raises(UserError) as caught:
        check_ranges(cls(**{key.partition(".")[2]: value}), key.partition(".")[0])
    text = str(caught.value)
    assert text.startswith(f"{key}={value} must be ") and text.endswith(".") and "\n" not in text


def test_a_range_is_said_with_its_bounds() -> None:
    @dataclasses.dataclass
    class Some:
        share: float = ranged(0.5, min=0, below=1)
        count: int | None = ranged(None, min=1)
        free: float = 0.0

    for values, said in (
        ({"share": 1.0}, "x.share=1.0 must be at least 0 and less than 1."),
        ({"count": 0}, "x.count=0 must be at least 1, or null."),
        ({"count": 2**63}, f"x.count={2**63} must be at least 1 and at most {2**63 - 1}, or null."),
        ({"free": float("inf")}, "x.free=inf must be finite."),
    ):
        with pytest.raises(UserError) as caught:
            check_ranges(Some(**values), "x")  # type: ignore[arg-type]
        assert str(caught.value) == said
    with pytest.raises(UserError, match=f"at most {2**63 - 1}, or null"):
        check_ranges(Some(count=10**400), "x")  # larger than any float
    check_ranges(Some(), "x")


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
        from mft.config.schema import Launch  # judged where the job is, since it decides the number of ranks

        cfg = compose_resolved(["model=tiny", override])
        check_ranges(Launch(**{key: cfg.launch[key] for key in ("lost_seconds", "join_seconds")}), "launch")
        return ""

    with pytest.raises(UserError) as caught:
        said()
    text = str(caught.value)
    assert all(part in text for part in parts) and "\n" not in text, text


@pytest.mark.parametrize(
    "override, parts",
    [
        ("model.heads=0", ["model.heads=0 must be at least 1"]),
        ("peft.alpha=nan", ["peft.alpha"]),
        (
            "loss=coba loss.variant=papr",
            ["loss.variant='papr': must be one of paper, mftcoder", "did you mean paper?"],
        ),
        (
            "loss=task_focal loss.gamma_by_task={nope: 1}",
            ["loss.gamma_by_task.nope: unknown task", "Allowed: task"],
        ),
        (
            "loss=task_focal loss.gamma_by_task={task: nan}",
            ["loss.gamma_by_task.task=nan must be at least 0"],
        ),
        ("loss=dwa loss.window=0", ["loss.window=0 must be at least 1"]),
        ("loss=coba loss.tau=nan", ["loss.tau=nan must be greater than 0 and finite"]),
        ("+peft.rank=4 peft=full", ["peft.rank", "Fields: none"]),
        (
            "dist=zero2 dist.config={zero_optimization: {stag: 2}}",
            ["zero_optimization.stag", "did you mean stage?"],
        ),
    ],
)
def test_ranges_of_components(override: str, parts: list[str], tmp_path: Path) -> None:
    text = message(
        "model=tiny",
        f"cache_dir={tmp_path}",
        f"data.paths=[{rows(tmp_path / 'task')}]",
        *override.split(" ", 1),
    )
    assert all(part in text for part in parts), text


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


# --- settings without effect ---


def inert(*overrides: str, world: int = 1, sweep: bool = False) -> list[str]:
    cfg = compose_resolved(["model=tiny", "data.paths=[a,b]", *overrides])
    return without_effect(cfg, world, given_keys(overrides), sweep)


@pytest.mark.parametrize(
    "overrides, said",
    [
        (["train.early_stopping_stall_num=5"], "train.early_stopping is false"),
        (["train.prompts_max_new_tokens=5"], "train.prompts is null"),
        (["train.deterministic=true"], "no GPU is visible here, and a CPU repeats itself"),
        (["launch.prune=true"], "this is one run, not a sweep (-m)"),
        (["launch.jobs=2"], "this is one run, not a sweep (-m)"),
        (["train.eval_every=7", "data.split=[100,0,0]"], "no task has validation samples"),
        (["train.keep_task_best=true", "data.split=[100,0,0]"], "no task has validation samples"),
        (
            ["train.save_state=last", "train.keep=1", "data.split=[100,0,0]"],
            "train.keep=1 keeps one checkpoint",
        ),
        (["train.save_every=50", "train.max_steps=20"], "train.max_steps=20 ends the run first"),
        (["launch.main_port=29400"], "launch.nnodes is 1"),
        (["launch.shutdown_seconds=5", "launch=inline"], "launch.mode is inline"),
        (["data.pad_to=seq_length"], "it is read by data=pad"),
        (["data.length_group=8"], "it is read by data=pad"),
        (["data.window=8", "data=pad"], "data=pad makes windows of 50 x data.length_group samples"),
        (["data.mixture_by=tokens"], "data.mixture is natural"),
        (["data.mixture_temperature=3", "data.mixture=shares"], "data.mixture is shares"),
        (["data.mixture=temperature", "data.paths=[a]"], "there is one task"),
        (["peft.rank=4", "peft.path=adapter"], "peft.path is given"),
        (["peft=qlora", "peft.bits=8", "peft.quant_type=fp4"], "peft.bits is 8"),
        (["peft.fused=false", "peft.use_dora=true"], "adapters of DoRA take peft's own path"),
        (["peft.fused=false", "peft.dropout=0.1"], "adapters with dropout take peft's own path on a CPU"),
        (["peft=qlora", "peft.fused=false"], "adapters of quantised layers take peft's own path"),
        (
            ["dist=zero3", "peft.fused=false"],
            "dist=zero3 gathers weights module by module, so peft's own path is taken",
        ),
        (["model.pad_to_multiple_of=8"], "model.add_tokens is empty"),
        (["loss=famo", "loss.probe_samples=4"], "loss.source is train"),
        (["dist=ddp", "dist.find_unused_parameters=true"], "the run has one rank"),
        (["dist=zero2", "dist.reduce_bucket_size=1000"], "the run has one rank"),
        (["dist=fsdp", "dist.timeout_minutes=5"], "the run has one rank"),
        (["tracking.mlflow.store=here", "tracking.mlflow.uri=http://h:5000"], "tracking.mlflow.uri is given"),
        (["sweep=mine"], "this is one run, not a sweep (-m)"),
    ],
)
def test_a_setting_without_effect_is_reported_with_the_reason(overrides: list[str], said: str) -> None:
    notes = inert(*overrides)
    assert len(notes) == 1 and notes[0].endswith(f" has no effect: {said}."), notes
    assert notes[0].partition(" ")[0] in overrides


def test_a_setting_with_an_effect_is_not_reported() -> None:
    assert not inert("train.early_stopping=true", "train.early_stopping_stall_num=5")
    assert not inert("launch.prune=true", "launch.prune_after=3", "launch.jobs=2", sweep=True)
    assert not inert("train.save_state=last", "train.keep=1")
    assert not inert("data=pad", "data.length_group=8", "data.pad_to=longest")
    assert not inert("peft.fused=false")
    assert not inert("peft.fused=false", "peft=qlora", "peft.skip_modules=[o_proj]")
    assert not inert("dist=ddp", "dist.find_unused_parameters=true", world=2)
    assert not inert(
        "launch.main_port=29500", "train.early_stopping_stall_num=3", "peft=qlora", "peft.bits=8"
    ), "defaults"
    (peak,) = inert("scheduler.warmup=100", "train.max_steps=20")
    assert "does not reach its peak" in peak
    assert [
        note.partition(" has")[0] for note in inert("output_dir=x", "train.resume=never", sweep=True)
    ] == [
        "train.resume=never",
        f"output_dir={Path('x').absolute()}",
    ]


@pytest.mark.parametrize("group", ["experiment", "debug"])
def test_no_preset_of_ours_sets_what_has_no_effect(group: str) -> None:
    for option in group_options(group):
        cfg = compose_resolved([f"{group}={option}"] if option != "search" else ["experiment=demo"])
        everything = [key for key, _ in rules(cfg.task) if key != "choices"]
        notes = without_effect(cfg, 2, everything, sweep=option in ("loss_study", "search"))
        kept = [n for n in notes if not n.startswith(("output_dir", "sweep"))]
        assert not kept, (option, kept)


def test_keys_of_ones_own_yaml_count_as_given(tmp_path: Path) -> None:
    (tmp_path / "experiment").mkdir()
    text = "# @package _global_\ntrain:\n  early_stopping_stall_num: 7\n"
    (tmp_path / "experiment" / "mine.yaml").write_text(text)
    overrides = ["model=tiny", "data.paths=[a]", "experiment=mine"]
    cfg = compose_resolved(overrides, [tmp_path])
    (note,) = without_effect(cfg, 1, given_keys(overrides, [tmp_path]))
    assert note.startswith("train.early_stopping_stall_num=7 has no effect")


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
        ["bash", "-c", f"set -o pipefail; {command}"], capture_output=True, text=True, env=environment
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
