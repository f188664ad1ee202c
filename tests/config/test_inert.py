"""Settings without effect: one line each, with the reason."""

from __future__ import annotations

from pathlib import Path

import pytest

from mft.config.compose import compose_resolved
from mft.config.given_keys import given_keys
from mft.config.inert import rules, without_effect
from mft.config.overrides import group_options


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
        (["train.profile=true", "train.max_steps=5"], "the first 5 steps are not recorded"),
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
    assert not inert("train.profile=true", "train.max_steps=6")
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
