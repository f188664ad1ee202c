"""What the check of a whole config refuses before any process starts or model loads."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from mft.config.build import component
from mft.config.compose import compose_resolved
from mft.config.validate import check, check_validation
from mft.errors import UserError
from mft.loss.coba import Coba
from mft.loss.means import TaskTokenMean
from mft.training.settings import TrainSettings
from tests.loss.modes import MODES, made
from tests.model import quantised

NOT_OF_LION = ("~optimizer.beta1", "~optimizer.beta2", "~optimizer.eps", "~optimizer.fused")
"""Fields of optimizer=adamw."""


@pytest.fixture
def rows(tmp_path: Path) -> Path:
    turns = [{"role": "human", "content": "a"}, {"role": "bot", "content": "b"}]
    for name in ("naming", "checking"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "rows.jsonl").write_text(json.dumps({"chat_rounds": turns}) + "\n")
    return tmp_path


def checked(rows: Path, *overrides: str) -> None:
    check(compose_resolved(["model=tiny", f"cache_dir={rows}", *overrides]), world=1)


def test_what_needs_validation_is_refused_where_there_is_none(rows: Path) -> None:
    without = (f"data.paths=[{rows / 'naming'}]", "data.split=[100,0,0]")
    for mode in ("coba", "self_paced", "famo_valid"):
        with pytest.raises(
            UserError,
            match=r"loss=\w+ learns its weights from validation samples.*data\.split",
        ):
            checked(rows, *without, f"loss={mode}")
    with pytest.raises(UserError, match=r"train\.early_stopping=true needs validation samples"):
        checked(rows, *without, "train.early_stopping=true")
    with pytest.raises(UserError, match=r"train\.best=naming: this task has no validation samples"):
        checked(rows, *without, "train.best=naming")
    checked(rows, *without, "loss=famo")


def test_a_tasks_own_validation_rows_are_enough(rows: Path) -> None:
    named = ("+task.naming._target_=mft.data.task.Task", f"+task.naming.paths=[{rows / 'naming'}]")
    checked(rows, *named, f"+task.naming.valid=[{rows / 'checking'}]", "data.split=[100,0,0]", "loss=coba")


def test_counted_samples_are_judged_by_the_same_rule() -> None:
    check_validation(TrainSettings(best="a"), Coba(), {"a": 3, "b": 0})
    with pytest.raises(UserError, match=r"train\.best=b"):
        check_validation(TrainSettings(best="b"), TaskTokenMean(), {"a": 3, "b": 0})
    with pytest.raises(UserError, match="loss=coba"):
        check_validation(TrainSettings(), Coba(), {"a": 0, "b": 0})


@pytest.mark.parametrize(
    "setting",
    [
        "epochs=inf",
        "max_grad_norm=0",
        "max_grad_norm=-1",
        "max_grad_norm=nan",
        "peak_tflops=-1",
        "prompts_max_new_tokens=0",
        "seed=-1",
        "seed=99999999999999999999",
        "early_stopping_stall_num=0",
        "prompts=/nowhere.jsonl",
    ],
)
def test_settings_no_run_could_work_with_are_refused(rows: Path, setting: str) -> None:
    key = setting.partition("=")[0]
    with pytest.raises(UserError, match=rf"^train\.{key}="):
        checked(rows, f"data.paths=[{rows / 'naming'}]", f"train.{setting}")


@pytest.mark.parametrize("mode", MODES)
def test_modes_that_need_validation_are_those_that_probe(mode: str) -> None:
    loss = made(mode)
    assert loss.needs_validation == loss.wants_probe(1)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            ["optimizer=adamw8bit", "dist=fsdp"],
            r"optimizer=adamw8bit: .*dist=fsdp.*; choose optimizer=adamw, or",
        ),
        (
            ["optimizer._target_=bitsandbytes.optim.Lion8bit", *NOT_OF_LION, "dist=fsdp"],
            r"optimizer\._target_=bitsandbytes\.optim\..*Lion8bit: .*dist=fsdp.*; choose optimizer=adamw, or",
        ),
        (["peft=qlora", "peft.bits=8", "dist=fsdp"], r"peft\.bits=8: .*; choose peft\.bits=4, or dist=zero2"),
        (
            ["peft=qlora", "peft.bits=8", "dist=zero3"],
            r"peft\.bits=8: .*; choose peft\.bits=4, or dist=zero2",
        ),
        (
            ["peft=qlora", "dist=fsdp", "peft.storage_dtype=fp32"],
            r"peft\.storage_dtype=fp32: .*=bf16, or null",
        ),
        (
            ["peft=qlora", "dist=zero2", "peft.storage_dtype=fp16"],
            r"peft\.storage_dtype=fp16: .*=bf16, or null",
        ),
        (
            ["peft=qlora", "dist=zero3", "peft.storage_dtype=fp16"],
            r"peft\.storage_dtype=fp16: .*=bf16, or null",
        ),
        (["peft.targets=5"], r"peft\.targets=5 must be a list of module names, one regular expression"),
        (["peft.targets=[5]"], r"peft\.targets=\[5\] must be a list"),
        (["peft.targets={q_proj:1}"], r"peft\.targets=\{'q_proj': 1\} must be a list"),
        (["peft.targets=true"], r"peft\.targets=true must be a list"),
        (["peft.targets=''"], r"peft\.targets='' must be a list"),
        (["peft.targets=[qproj]"], r"'qproj' matches no module; .*; did you mean q_proj"),
        (["peft.targets='.*layers\\.99.*'"], r"the regular expression .* matches no module"),
        (["peft.modules_to_save=[lmhead]"], r"peft\.modules_to_save: the name 'lmhead' matches no module"),
        (
            ["peft.rank=100000"],
            r"peft\.rank=100000: the matrices of this model have no rank above 64, its hidden size",
        ),
        (["peft=qlora", "peft.rank=65"], r"peft\.rank=65: "),
        (["model.router_coef=0.1"], r"model\.router_coef=0\.1: LlamaForCausalLM has no router; remove it"),
        (
            ["peft=full", "model.router_coef=0.1"],
            r"model\.router_coef=0\.1: LlamaForCausalLM has no router; remove it",
        ),
    ],
)
def test_what_a_rank_would_refuse_is_refused_before_any_starts(
    rows: Path, settings: list[str], message: str
) -> None:
    with pytest.raises(UserError, match=message):
        checked(rows, f"data.paths=[{rows / 'naming'}]", "train.precision=bf16", *settings)


@pytest.mark.parametrize(
    "settings",
    [
        ["optimizer=adamw8bit", "dist=ddp"],
        ["peft=qlora", "dist=fsdp"],
        ["peft=qlora", "dist=fsdp", "peft.storage_dtype=bf16"],
        ["peft=qlora", "dist=fsdp", "peft.storage_dtype=fp32", "train.precision=fp32"],
        ["peft=qlora", "dist=zero2", "peft.storage_dtype=uint8"],
        ["peft=qlora", "dist=zero2", "peft.bits=8"],
        ["peft=qlora", "dist=ddp", "peft.storage_dtype=fp32"],
        ["peft.rank=64"],
        ["peft.targets=all-linear"],
    ],
)
def test_what_goes_together(rows: Path, settings: list[str]) -> None:
    checked(rows, f"data.paths=[{rows / 'naming'}]", "train.precision=bf16", *settings)


def test_a_quantised_base_is_refused_before_any_rank_starts(
    rows: Path, tiny_folder: Path, tmp_path: Path
) -> None:
    quantised.fp8(tiny_folder, tmp_path / "fp8")
    for mode in ("full", "lora", "qlora"):
        given = [
            f"data.paths=[{rows / 'naming'}]",
            "model=auto",
            f"model.path={tmp_path / 'fp8'}",
            f"peft={mode}",
        ]
        with pytest.raises(UserError, match="quantised by fp8; write its real values once, `mft convert"):
            check(compose_resolved(given), world=1)


def own_task(rows: Path, name: str, text: str) -> str:
    """Writes the yaml of a task with these lines; returns the override that chooses it."""
    (rows / "conf" / "task").mkdir(parents=True, exist_ok=True)
    head = f"# @package task.{name}\n_target_: mft.data.task.Task\npaths: [{rows / 'naming'}]\n"
    (rows / "conf" / "task" / f"{name}.yaml").write_text(head + text)
    return f"task=[{name}]"


def composed(rows: Path, *overrides: str) -> Any:
    return compose_resolved(["model=tiny", f"cache_dir={rows}", *overrides], [rows / "conf"])


def test_every_field_of_a_task_can_be_set_where_its_yaml_leaves_it_out(rows: Path) -> None:
    choice = own_task(rows, "z", "format: chat\n")
    given = (
        "task.z.weight=2",
        "task.z.share=1",
        "task.z.hint=none",
        "task.z.name=zed",
        f"task.z.valid=[{rows}]",
    )
    cfg = composed(rows, choice, *given, "data.mixture=shares", f"task.z.valid=[{rows / 'checking'}]")
    check(cfg, world=1)
    assert (cfg.task.z.weight, cfg.task.z.name, list(cfg.task.z.valid)) == (
        2,
        "zed",
        [str(rows / "checking")],
    )


@pytest.mark.parametrize(
    ("override", "says"),
    [
        ("task.z.wieght=2", r"task\.z\.wieght: Task has no such field; did you mean weight\?"),
        ("task.zz.weight=2", r"task\.zz\.weight: no task 'zz' is chosen.*Chosen: z;"),
        ("task.naming.weight=2", r"a folder of data\.paths has no settings of its own"),
        ("task.z.weight=nan", r"task\.z\.weight=nan must be at least 0 and finite"),
        ("task.z.weight=-1", r"task\.z\.weight=-1 must be"),
        ("task.z.weight=0", r"task\.z\.weight: all are 0, so nothing would be trained"),
        ("task.z.valid=x", r"task\.z\.valid='x': must be a list, such as \[a,b\]"),
        ("task.z.format=mesages", r"task\.z\.format='mesages': unknown format; did you mean messages\?"),
    ],
)
def test_a_wrong_field_of_a_task_is_one_sentence(rows: Path, override: str, says: str) -> None:
    choice = own_task(rows, "z", "format: chat\n")
    with pytest.raises(UserError, match=says):
        check(composed(rows, choice, override), world=1)


def test_a_weight_of_zero_is_refused_only_where_nothing_else_trains(rows: Path) -> None:
    own_task(rows, "y", "")
    own_task(rows, "z", "")
    two = ("task=[y,z]", "data.mixture=shares")
    check(composed(rows, *two, "task.z.weight=0"), world=1)
    check(composed(rows, *two, "task.z.share=0"), world=1)
    with pytest.raises(UserError, match=r"task\.y\.weight, task\.z\.weight: all are 0"):
        check(composed(rows, *two, "task.y.weight=0", "task.z.weight=0"), world=1)
    with pytest.raises(UserError, match=r"task\.z\.weight: all are 0"):
        check(composed(rows, *two, "task.y.share=0", "task.z.weight=0"), world=1)
    with pytest.raises(UserError, match=r"task\.y\.share, task\.z\.share: all are 0"):
        check(composed(rows, *two, "task.y.share=0", "task.z.share=0"), world=1)


def test_numbers_of_the_environment_reach_components_as_numbers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "rows.jsonl").write_text('{"prompt": "a", "answer": "b"}\n')
    monkeypatch.setenv("MFT_TEST_LR", "0.00012345")
    cfg = compose_resolved(
        ["model=tiny", f"data.paths=[{tmp_path}]", "tracking=none", "optimizer.lr=${oc.env:MFT_TEST_LR}"]
    )
    check(cfg, world=1)
    assert component(cfg, "optimizer").lr == 0.00012345
    assert cfg.optimizer._get_node("lr")._value() == "${oc.env:MFT_TEST_LR}"
    monkeypatch.setenv("MFT_TEST_LR", "fast")
    with pytest.raises(UserError, match=r"^optimizer\.lr="):
        check(cfg, world=1)
