"""What a person reads when a command line is wrong: the key, the value, what is allowed, the nearest
match."""

from __future__ import annotations

from pathlib import Path

import pytest

from mft.config.compose import compose_resolved
from mft.config.overrides import with_moved_keys
from mft.config.validate import check
from mft.errors import UserError
from tests.config.test_conf import rows


def message(*overrides: str, world: int = 1) -> str:
    with pytest.raises(UserError) as caught:
        check(compose_resolved(list(overrides)), world)
    return str(caught.value)


@pytest.mark.parametrize(
    "override, parts",
    [
        ("peft=lroa", ["peft=lroa", "did you mean lora?", "full, lora, qlora"]),
        ("pft=lora", ["pft", "did you mean peft?"]),
        ("peft.rnk=3", ["peft.rnk", "did you mean rank?", "alpha"]),
        ("lr=1e-4", ["lr", "did you mean optimizer.lr?"]),
        ("train.max_step=3", ["train.max_step", "did you mean max_steps?"]),
        ("train.max_steps=many", ["train.max_steps=many", "must be an integer"]),
        ("task=[docstrin]", ["docstrin", "did you mean docstring?", "function_body", "data.paths"]),
        ("experiment=deno", ["deno", "did you mean demo?"]),
        ("train.precision=bf61", ["train.precision", "bf16"]),
        ("train={steps: 3}", ["train.steps", "did you mean max_steps?"]),
        ("epocs=1", ["epocs", "did you mean train.epochs?"]),
        ("train.seq_length=64", ["train.seq_length", "did you mean data.seq_length?"]),
        ("+launch.fast=1", ["launch.fast", "did you mean fail_fast?"]),
        ("train.prune=true", ["train.prune: this key has moved; write launch.prune=…"]),
        ("+train.fail_fast=true", ["write launch.fail_fast=…"]),
        ("+nme=1", ["nme", "did you mean name?"]),
        ("peft=3", ["peft=3", "full, lora, qlora"]),
        ("+loss=coba", ["+loss", "loss=… without the plus"]),
        ("peft=lora,qlora", ["mft train -m peft=lora,qlora", "peft=[lora,qlora]"]),
        ("data.paths=here", ["data.paths=here", "[a,b]"]),
        ("data.paths=[here", ["data.paths=[here", "quotes"]),
        ("data.paths=[[here]]", ["data.paths", "['here'] must be a path"]),
        ("data.paths=null", ["data.paths=null", "must not be null"]),
        ("name=[a]", ["name=[a]", "string"]),
        ("~train.epochs", ["~train.epochs", "cannot be removed"]),
        ("~peft", ["~peft", "peft=…"]),
        ("task.sql.weight=2", ["task.sql.weight", "Chosen: none", "data.paths"]),
        ("loss.gamma_by_task.sql=1.5", ["loss.gamma_by_task is null so far", "+loss.gamma_by_task.sql=…"]),
    ],
)
def test_a_wrong_key_or_choice_is_named_with_the_nearest_match(override: str, parts: list[str]) -> None:
    text = message("model=tiny", "loss=task_focal", override)
    assert all(part in text for part in parts), text
    assert "\n" not in text


@pytest.mark.parametrize(
    "override, parts",
    [
        ("optimizer.lr=fast", ["optimizer.lr='fast'", "must be a number"]),
        ("peft.rank=1.5", ["peft.rank=1.5", "must be an integer"]),
        ("model.attention=sdp", ["model.attention='sdp'", "sdpa"]),
        ("+loss.gama=2", ["loss.gama", "no such field"]),
        ("scheduler.min_lr=1.0", ["min_lr"]),
        ("train.log_every=0", ["train.log_every=0", "at least 1"]),
        ("data.seq_length=1", ["data.seq_length", "2"]),
        ("data.split=[1,2]", ["data.split", "[95,5,0]"]),
        ("data.template=mfft", ["data.template", "did you mean mft?"]),
        ("data.role_markers={usr: x}", ["data.role_markers", "'usr'", "did you mean user?"]),
        ("data.role_markers={user: 3}", ["data.role_markers.user", "3 is not text"]),
        (
            "model._target_=os.system",
            ["model._target_=os.system", "os is not a package that a config may name", "--plugin os"],
        ),
    ],
)
def test_what_only_a_component_can_judge(override: str, parts: list[str], tmp_path: Path) -> None:
    text = message("model=tiny", f"cache_dir={tmp_path}", f"data.paths=[{rows(tmp_path / 'task')}]", override)
    assert all(part in text for part in parts), text


def test_a_mapping_of_tasks_can_be_given_in_one_override(tmp_path: Path) -> None:
    task = rows(tmp_path / "sql")
    given = ["model=tiny", f"cache_dir={tmp_path}", f"data.paths=[{task}]", "loss=task_focal"]
    cfg = compose_resolved([*given, "loss.gamma_by_task={sql: 1.5}"])
    check(cfg, world=1)
    assert cfg.loss.gamma_by_task == {"sql": 1.5}
    assert "gamma_by_task" in message(*given, "loss.gamma_by_task={sql: much}")


def test_a_missing_value_a_missing_folder_and_no_task_at_all(tmp_path: Path) -> None:
    task = rows(tmp_path / "unit_tests")
    assert "model.path is missing" in message(f"data.paths=[{task}]")
    assert "did you mean unit_tests?" in message("model=tiny", f"data.paths=[{tmp_path / 'unit_test'}]")
    assert "No task is chosen" in message("model=tiny")
    assert "mft demo" in message("model=tiny", "task=[docstring]", f"cache_dir={tmp_path}")


def test_two_folders_of_one_name_are_refused_with_both_named(tmp_path: Path) -> None:
    first, second = rows(tmp_path / "a" / "docs"), rows(tmp_path / "b" / "docs")
    text = message("model=tiny", f"cache_dir={tmp_path}", f"data.paths=[{first},{second}]")
    assert str(first) in text and str(second) in text


def test_batch_sizes_that_do_not_divide_name_the_nearest_that_do(tmp_path: Path) -> None:
    sizes = ["train.per_device_batch_size=4", "train.global_batch_size=18"]
    base = ["model=tiny", f"cache_dir={tmp_path}", f"data.paths=[{rows(tmp_path / 'task')}]"]
    text = message(*base, *sizes, world=2)
    assert "16 or 24" in text
    auto = ["train.per_device_batch_size=auto", "train.global_batch_size=18"]
    assert "18 must be a multiple of 4 ranks. Nearest values: 16 or 20" in message(*base, *auto, world=4)
    both = message(*base, "train.global_batch_size=8", "train.gradient_accumulation_steps=2")
    assert "train.global_batch_size=8" in both and "train.gradient_accumulation_steps=2" in both


def test_a_machine_that_cannot_do_what_is_asked_is_told_before_anything_starts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    base = ["model=tiny", f"cache_dir={tmp_path}", f"data.paths=[{rows(tmp_path / 'task')}]"]
    assert "dist=single with 2 ranks" in message(*base, world=2)
    assert "fp16 needs a GPU" in message(*base, "train.precision=fp16")


def test_a_task_yaml_of_ones_own_config_dir_is_found(tmp_path: Path) -> None:
    (tmp_path / "task").mkdir()
    (tmp_path / "task" / "sql.yaml").write_text(
        "# @package task.sql\ndefaults:\n  - /format@format: chat\n_target_: mft.data.task.Task\npaths: "
        "[/data/sql]\n"
    )
    cfg = compose_resolved(["task=[sql,docstring]"], [tmp_path])
    assert cfg.task.sql.paths == ["/data/sql"] and "docstring" in cfg.task
    with pytest.raises(UserError, match="not a folder"):
        compose_resolved([], [tmp_path / "nowhere"])


@pytest.mark.parametrize(
    "yaml, parts",
    [
        ("# @package _global_\ntrain:\n  max_stesp: 3\n", ["experiment/it.yaml", "did you mean max_steps?"]),
        (
            "# @package _global_\ntrain:\n  max_steps: ten\n",
            ["experiment/it.yaml: train.max_steps", "must be an integer"],
        ),
        ("# @package _global_\npeft: lora\n", ["peft", "got 'lora'", "override /peft: NAME"]),
        ("train:\n  max_steps: 3\n", ["experiment/it.yaml", "`# @package _global_`"]),
        ("# @package _global_\n- train\n", ["experiment/it.yaml", "no keys"]),
        ("train: [1\nname: a", ["experiment/it.yaml:2", "not valid YAML"]),
    ],
)
def test_a_wrong_yaml_of_ones_own_is_named(yaml: str, parts: list[str], tmp_path: Path) -> None:
    folder = tmp_path / "it's a=b, [c]"
    (folder / "experiment").mkdir(parents=True)
    (folder / "experiment" / "it.yaml").write_text(yaml)
    with pytest.raises(UserError) as caught:
        check(compose_resolved(["model=tiny", "experiment=it"], [folder]), world=1)
    assert all(part in str(caught.value) for part in parts), str(caught.value)
    with pytest.raises(UserError, match=r"did you mean it\?.*Allowed: demo, .*it"):
        compose_resolved(["experiment=iit"], [folder])


def test_a_task_yaml_without_its_first_line_is_told_so(tmp_path: Path) -> None:
    (tmp_path / "task").mkdir()
    (tmp_path / "task" / "sql.yaml").write_text("_target_: mft.data.task.Task\npaths: [/data/sql]\n")
    with pytest.raises(UserError, match=r"begins with the line `# @package task\.NAME`"):
        check(compose_resolved(["model=tiny", "task=sql"], [tmp_path]), world=1)


def test_relative_paths_become_absolute(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    cfg = compose_resolved(["data.paths=[here/task]", "output_dir=out"])
    assert list(cfg.data.paths) == [str(tmp_path / "here" / "task")]
    assert cfg.output_dir == str(tmp_path / "out")


def test_a_recorded_command_is_read_under_the_present_names_of_its_keys() -> None:
    recorded = ["train.prune=true", "+train.fail_fast=true", "optimizer.lr=1e-3,2e-3", "train.pruned=x"]
    assert with_moved_keys(recorded) == ["launch.prune=true", "+launch.fail_fast=true", *recorded[2:]]
