"""Which classes a config may name, from whatever place it comes, and the example plug-in at work."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from mft.config import plugins
from mft.config.build import build, component
from mft.config.compose import compose_resolved
from mft.config.schema import load
from mft.config.validate import check
from mft.errors import UserError
from tests import forked, sweeping
from tests.selection import long

EXAMPLE = Path(__file__).parents[2] / "examples" / "plugin"


@pytest.fixture(autouse=True)
def nothing_named():
    plugins.start([])
    yield
    plugins.start([])


@pytest.fixture
def work(tmp_path: Path) -> Path:
    (tmp_path / "faq").mkdir()
    rows = [json.dumps({"faq": [f"how many {i}?", f"{i} of them, {i} = n"]}) for i in range(60)]
    (tmp_path / "faq" / "rows.jsonl").write_text("\n".join(rows))
    return tmp_path


def package(folder: Path, name: str, text: str) -> None:
    """Writes a package whose import leaves a mark."""
    (folder / name).mkdir(parents=True)
    mark = f"import pathlib\npathlib.Path({str(folder / 'imported')!r}).touch()\n"
    (folder / name / "__init__.py").write_text(mark + text)


def refusal(work: Path, *overrides: str, yaml: str = "") -> str:
    given = ["model=tiny", f"cache_dir={work}", f"data.paths=[{work / 'faq'}]", "tracking=none", *overrides]
    if yaml:
        (work / "yaml" / "experiment").mkdir(parents=True, exist_ok=True)
        (work / "yaml" / "experiment" / "it.yaml").write_text(f"# @package _global_\n{yaml}\n")
        given.append("experiment=it")
    with pytest.raises(UserError) as caught:
        check(compose_resolved(given, [work / "yaml"] if yaml else []), world=1)
    return str(caught.value)


@pytest.mark.parametrize(
    "target, part",
    [
        ("mft.cli.main", "is a function"),
        ("mft.files.json_file.write_json", "is a function"),
        ("mft.files.atomic.remove", "is a function"),
        ("mft.run_folder", "is a module"),
        ("mft.loss.means", "mft.loss"),
        ("mft.run_folder.LOCK", "is a value"),
        ("mft.data.cache.store.Store", "expected a subclass of mft.loss.base.TaskLoss"),
        ("mft.data.formats.Chat", "expected a subclass of mft.loss.base.TaskLoss"),
        ("mft.run_folder.Path", "defined in pathlib"),
        ("mft.config.build.importlib.import_module", "there is no module mft.config.build.importlib"),
        ("mft.model.causal_lm.os.system", "there is no module mft.model.causal_lm.os"),
        ("mft.loss.meen.TokenMean", "did you mean means?"),
        ("mft.loss.means.TokenMeen", "did you mean TokenMean?"),
        ("mft.loss.base.TaskLoss", "does not define share"),
        ("mft.loss.means.Mean", "does not define unit_weights"),
        ("torch.optim.AdamW", "--plugin torch"),
        ("torch.load", "--plugin torch"),
        ("os.system", "--plugin os"),
        ("mftx.loss.Loss", "did you mean mft?"),
        ("builtins.eval", "--plugin builtins"),
        ("'ｍft.cli.main'", "expected package.module.Class"),
        ("'mft.loss.means.TokenMean '", "expected package.module.Class"),
        ("mft.loss.means.", "expected package.module.Class"),
        ("mft..TokenMean", "expected package.module.Class"),
        (".mft.loss.mean.TokenMean", "expected package.module.Class"),
        ("mft.loss.means.TokenMean.share", "there is no module mft.loss.means.TokenMean"),
        ("mft.loss.means.TokenMean.__init__", "there is no module mft.loss.means.TokenMean"),
        ("5", "has no _target_"),
        ("null", "has no _target_"),
        ("[a]", "has no _target_"),
    ],
)
def test_a_target_must_be_a_component_of_its_group(target: str, part: str, work: Path) -> None:
    assert part in refusal(work, f"loss._target_={target}")


@pytest.mark.parametrize(
    "target, part",
    [("mft.cli.main", "is a function"), ("os.system", "--plugin os"), ("mft..TokenMean", "expected package")],
)
def test_so_must_one_of_a_yaml(target: str, part: str, work: Path) -> None:
    assert part in refusal(work, yaml=f"loss: {{_target_: {target}}}")


@pytest.mark.parametrize(
    "path, target, part",
    [
        ("optimizer", "torch.optim.lr_scheduler.StepLR", "expected a subclass of torch.optim"),
        ("optimizer", "torch.optim.Optimizer", "base of all optimizers"),
        ("optimizer", "torch.optim.adamw.Tensor", "defined in torch"),
        ("optimizer", "torch.load", "--plugin torch"),
        ("optimizer", "mft.optim.optimizers.Library", "not a dataclass"),
        ("optimizer", "mft.optim.optimizers.Adam", "does not define build"),
        ("scheduler", "mft.optim.schedules.Decay", "does not define curve"),
        ("scheduler", "mft.optim.optimizers.AdamW", "expected a subclass of mft.optim.schedules.Schedule"),
        ("model", "mft.model.merge.Merged", "expected a subclass of mft.model.causal_lm.CausalLM"),
        ("peft", "mft.optim.optimizers.AdamW", "expected a subclass of mft.model.peft.full.Full"),
        ("dist", "mft.distributed.ddp.DdpEngine", "expected a subclass of mft.distributed.engine.Backend"),
        ("data.rows", "mft.data.task.Task", "expected a subclass of mft.data.packing.RowBuilder"),
        ("+tracking.x", "mft.tracking.base.Jsonl", "not a dataclass"),
        ("+tracking.x", "mft.optim.optimizers.AdamW", "expected a subclass of mft.tracking.base.Tracker"),
        ("+task.x", "mft.files.json_file.write_json", "is a function"),
        ("+task.x", "mft.data.formats.Chat", "expected a subclass of mft.data.task.Task"),
    ],
)
def test_every_group_has_a_contract(path: str, target: str, part: str, work: Path) -> None:
    assert part in refusal(work, f"{path}._target_={target}")


def test_nodes_inside_a_component_and_hydras_other_keys_fall_under_the_rule(work: Path) -> None:
    task = f"task: {{x: {{_target_: mft.data.task.Task, paths: [{work}/faq], format: %s}}}}"
    assert "mft.data.formats.Format" in refusal(work, yaml=task % "{_target_: mft.data.cache.store.Store}")
    assert "is a function" in refusal(
        work, yaml=task % "{_target_: mft.files.json_file.write_json, path: a, values: {}}"
    )
    assert "loss.weights: " in refusal(
        work, yaml="loss: {weights: [{_target_: mft.files.atomic.remove, folder: x}]}"
    )
    remove = "{_target_: mft.files.atomic.remove, folder: x}"
    nested = f"dist: {{_target_: mft.distributed.deepspeed.Zero2, config: {{a: [{remove}]}}}}"
    assert "dist.config.a[0]._target_=mft.files.atomic.remove: is a function" in refusal(work, yaml=nested)
    for key in ("_partial_: true", "_args_: [a]", "_recursive_: false", "_convert_: all", "_x_: 1"):
        assert f"loss.{key.partition(':')[0]}: unexpected" in refusal(work, yaml=f"loss: {{{key}}}")
    for places in ("+train._target_=os.system", "+data._target_=os.system", "+_target_=os.system"):
        assert "_target_" in refusal(work, places)
    assert "tracking._target_" in refusal(work, "+tracking._target_=os.system")
    assert "name" in refusal(work, "name={_target_: os.system}")


def test_a_yaml_cannot_name_a_package_and_nothing_of_it_is_imported(
    work: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    package(work, "sneaky", "from package_that_is_not_there import Clipped\n")
    monkeypatch.syspath_prepend(str(work))
    monkeypatch.chdir(work)
    assert "--plugin sneaky" in refusal(work, yaml="loss: {_target_: sneaky.Clipped}")
    for key in (
        "plugin: [sneaky]",
        "plugins: [sneaky]",
        "train: {plugins: [sneaky]}",
        "train: {plugin: sneaky}",
    ):
        assert "plugin" in refusal(work, yaml=f"{key}\nloss: {{_target_: sneaky.Clipped}}")
    assert "--plugin sneaky" in refusal(work, "hydra.searchpath=[pkg://sneaky]")
    assert not (work / "imported").exists()
    plugins.name(["sneaky"])
    assert "sneaky needs the module package_that_is_not_there" in refusal(
        work, yaml="loss: {_target_: sneaky.Clipped}"
    )


@pytest.mark.parametrize("given", ["train.allow_targets=[joblib.]", "+train.allow_targets=[]"])
def test_the_key_of_earlier_versions_names_what_stands_in_its_place(given: str, work: Path) -> None:
    assert "--plugin" in refusal(work, given)
    assert "--plugin" in refusal(work, yaml="train: {allow_targets: ['joblib.']}")


@pytest.mark.parametrize(
    "package, part",
    [
        ("os", "part of Python"),
        ("mft", "part of mft"),
        ("nowhere_at_all", "no package"),
        ("a b", "expected"),
        ("", "expected"),
    ],
)
def test_what_cannot_be_a_plugin_is_refused(package: str, part: str) -> None:
    with pytest.raises(UserError, match=part):
        plugins.start([package])
    assert plugins.named() == ()


def test_entry_points_name_packages_and_those_of_python_itself_do_not_count(
    work: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    info = work / "bad-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: bad\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text("[mft.components]\na = os\nb = subprocess:run\nc = mft_example\n")
    monkeypatch.syspath_prepend(str(work))
    assert plugins.allowed() == ["mft_example"]
    assert "--plugin os" in refusal(work, "loss._target_=os.system")


def test_what_fails_while_a_plugin_is_imported_is_told_with_its_place(
    work: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(str(work))
    for name, text, part in (
        ("one", "import no_such_thing", "needs the module no_such_thing"),
        ("two", "x = 1 / 0", "ZeroDivisionError"),
        ("three", "def f(:", "SyntaxError"),
        ("four", "raise SystemExit(3)", "SystemExit"),
    ):
        package(work / name, f"broken_{name}", f"\n{text}\n")
        monkeypatch.syspath_prepend(str(work / name))
        plugins.name([f"broken_{name}"])
        said = refusal(work, f"loss._target_=broken_{name}.Loss")
        assert part in said and "loss._target_" in said
        assert name == "one" or f"broken_{name}/__init__.py:4" in said, said


def test_an_optimizer_of_torch_can_be_named_by_its_own_class(work: Path) -> None:
    import torch

    (work / "yaml" / "optimizer").mkdir(parents=True)
    sgd = "_target_: torch.optim.SGD\nlr: null\nmomentum: 0.9\nweight_decay: 0.1\n"
    (work / "yaml" / "optimizer" / "sgd.yaml").write_text(sgd)
    given = ["model=tiny", f"cache_dir={work}", "optimizer=sgd", "tracking=none"]
    live = component(compose_resolved(given, [work / "yaml"]), "optimizer").build(
        torch.nn.Linear(2, 2).named_parameters(), 1e-3
    )
    assert isinstance(live, torch.optim.SGD)
    assert [(g["lr"], g["momentum"], g["weight_decay"]) for g in live.param_groups] == [
        (1e-3, 0.9, 0.1),
        (1e-3, 0.9, 0.0),
    ]
    (work / "faq" / "chat.jsonl").write_text('{"prompt": "a", "answer": "b"}\n')
    (work / "faq" / "rows.jsonl").unlink()
    for change, part in (
        ("+optimizer.momentun=1", "did you mean momentum?"),
        ("optimizer.momentum=-1", "refuses"),
    ):
        with pytest.raises(UserError, match="optimizer") as caught:
            check(compose_resolved([*given, f"data.paths=[{work}/faq]", change], [work / "yaml"]), world=1)
        assert part in str(caught.value).replace("Invalid", "refuses")


CALLBACK = "hydra: {callbacks: {x: {_target_: %s}}}"


@pytest.mark.parametrize(
    "yaml, part",
    [
        (CALLBACK % "os.system, command: touch PWNED", "hydra.callbacks.x._target_=os.system"),
        (CALLBACK % "mft.files.json_file.write_json", "expected a subclass of hydra"),
        (CALLBACK % "hydra.utils.instantiate", "hydra is not a package"),
        (CALLBACK % "hydra.experimental.callbacks.Path", "expected a subclass of hydra"),
        (CALLBACK % "mft.run_folder.Path, _args_: [a]", "_args_: unexpected"),
        (
            "hydra: {callbacks: {x: {_target_: hydra.experimental.callbacks.LogJobReturnCallback, "
            "y: {_target_: os.system}}}}",
            "hydra.callbacks.x.y._target_=os.system: unexpected",
        ),
        ("hydra: {launcher: {_target_: os.system}}", "expected an installed launcher"),
        ("hydra: {launcher: {_target_: hydra.utils.instantiate}}", "expected an installed launcher"),
        ("hydra: {sweeper: {_target_: mft.cli.main}}", "expected an installed sweeper"),
        ("hydra: {sweeper: {params: {_target_: os.system}}}", "hydra.sweeper.params._target_=os.system"),
        ("hydra: {job_logging: {handlers: {x: {class: subprocess.Popen}}}}", "job_logging.handlers.x.class"),
        ("hydra: {job_logging: {handlers: {x: {(): os.system}}}}", "job_logging.handlers.x.()"),
        ("hydra: {hydra_logging: {formatters: {x: {(): os.system}}}}", "hydra_logging.formatters.x.()"),
        ("hydra: {hydra_logging: {filters: {x: {(): 'ext://os.system'}}}}", "hydra_logging.filters.x.()"),
        (
            "hydra: {hydra_logging: {formatters: {x: {format: 'ext://antigravity.a'}}}}",
            "expected one of ext://sys",
        ),
        (
            "hydra: {job_logging: {handlers: {x: {class: logging.FileHandler, filename: /tmp/x, mode: w}}}}",
            "job_logging.handlers.x.filename='/tmp/x'",
        ),
        ("hydra: {job: {env_set: {LD_PRELOAD: x}}}", "env_set"),
        ("hydra: {job: {name: ../../x}}", "hydra.job.name"),
        ("hydra: {output_subdir: /tmp}", "hydra.output_subdir=/tmp"),
        ("hydra: {searchpath: ['pkg://sneaky']}", "searchpath"),
        (
            "defaults: [{override /hydra/launcher: submitit_slurm}]\nhydra: {launcher: {setup: ['touch "
            "PWNED']}}",
            "hydra.launcher.setup: shell commands",
        ),
        (
            'defaults: [{override /hydra/launcher: submitit_slurm}]\nhydra: {launcher: {partition: "a\\ntouch x"}}',
            "hydra.launcher.partition",
        ),
    ],
)
def test_hydras_own_nodes_fall_under_the_rule(yaml: str, part: str, work: Path) -> None:
    assert part in refusal(work, yaml=yaml)


@pytest.mark.parametrize(
    "flags",
    [["-m", "train.seed=1,2"], ["--cfg", "job"], ["--check"], long(["--dry-run"]), long(["-m", "--dry-run"])],
)
def test_no_way_in_runs_what_a_yaml_brings(flags: list[str], work: Path) -> None:
    (work / "yaml" / "experiment").mkdir(parents=True)
    for name, text in (
        ("callback", CALLBACK % "os.system, command: touch PWNED"),
        ("handler", "hydra: {hydra_logging: {handlers: {x: {(): os.system, command: touch PWNED}}}}"),
        ("loss", "loss: {_target_: os.system, command: touch PWNED}"),
    ):
        if name == "loss" and flags == ["--cfg", "job"]:
            continue  # prints it, builds nothing
        (work / "yaml" / "experiment" / f"{name}.yaml").write_text(f"# @package _global_\n{text}\n")
        given = [
            "model=tiny",
            "data.paths=[faq]",
            "tracking=none",
            f"experiment={name}",
            "--config-dir",
            "yaml",
        ]
        code, said = sweeping.mft(work, "train", *given, *flags)
        assert code == 2 and "os.system" in said and "Traceback" not in said, said
    assert not (work / "PWNED").exists()


# ---- the example package ----

RUN = [
    "model=tiny",
    "data.paths=[faq]",
    "loss=clipped",
    "tracking=table",
    "data.seq_length=128",
    "train.epochs=99",
]
RUN += ["train.precision=fp32", "train.per_device_batch_size=2", "train.log_every=1", "train.eval_every=null"]
RUN += ["loss.limit=50", "train.save_every=2", "train.eval_at_start=false", "dist=ddp", "launch.nproc=2"]
TASK = """\
# @package task.faq
defaults: [{/format@format: faq}, _self_]
_target_: mft.data.task.Task
paths: [faq]
"""


def mft(work: Path, path: Path | None, *args: str) -> str:
    """Runs a command with `path` on PYTHONPATH; returns what it said."""
    process = forked.Command(work, args, sweeping.environment(work), [str(path)] if path else [])
    said, _ = process.communicate(timeout=600)
    assert process.returncode == 0, said
    return said


def typed(work: Path, path: Path | None, *args: str) -> str:
    """Runs a command as a person types it, with `path` on PYTHONPATH; returns what it printed."""
    env = sweeping.environment(work)
    env["PYTHONPATH"] = os.pathsep.join([*([str(path)] if path else []), env.get("PYTHONPATH", "")]).rstrip(
        os.pathsep
    )
    command = [sys.executable, "-m", "mft.cli", *args]
    done = subprocess.run(command, cwd=work, env=env, text=True, capture_output=True, timeout=600)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def with_task(work: Path) -> list[str]:
    (work / "yaml" / "task").mkdir(parents=True)
    (work / "yaml" / "task" / "faq.yaml").write_text(TASK)
    return [*[o for o in RUN if not o.startswith("data.paths")], "task=[faq]", "--config-dir", "yaml"]


@pytest.mark.slow
@pytest.mark.dist
def test_a_named_plugin_trains_resumes_merges_and_answers(work: Path) -> None:
    given = with_task(work)
    mft(work, EXAMPLE, "train", *given, "train.max_steps=2", "output_dir=run", "--plugin", "mft_example")
    record = json.loads((work / "run" / "overrides.json").read_text())
    assert record["plugins"] == ["mft_example"]
    assert load(work / "run").loss._target_ == "mft_example.loss.Clipped"
    # without the flag: the folder knows it; the yaml files of the package come with it
    mft(work, EXAMPLE, "train", *given, "train.max_steps=4", "output_dir=run")
    lines = (work / "run" / "losses.tsv").read_text().splitlines()
    assert [line.split("\t")[0] for line in lines] == ["1", "2", "3", "4"]
    assert json.loads((work / "run" / "summary.json").read_text())["status"] == "finished"
    assert "merged into" in mft(work, None, "merge", "run")
    assert mft(work, None, "generate", "run", "how many 3?", "max_new_tokens=2") is not None
    report = mft(work, EXAMPLE, "data", "report", *given, "--plugin=mft_example")
    assert "faq" in report


@pytest.mark.slow
@pytest.mark.dist
@pytest.mark.long
def test_an_installed_plugin_needs_no_flag_and_a_sweep_remembers_a_named_one(work: Path) -> None:
    site = work / "site"
    shutil.copytree(EXAMPLE / "mft_example", site / "mft_example")
    info = site / "mft_example-0.1.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: mft-example\nVersion: 0.1\n")
    points = (EXAMPLE / "pyproject.toml").read_text().split('[project.entry-points."mft.components"]\n')[1]
    (info / "entry_points.txt").write_text(
        f"[mft.components]\n{points.splitlines()[0].replace(chr(34), '')}\n"
    )
    given = [*with_task(work), "train.max_steps=2"]
    assert "would run" in typed(work, site, "train", *given, "output_dir=run", "--check")
    typed(work, site, "train", *given, "launch.nproc=1", "output_dir=run")
    assert (work / "run" / "losses.tsv").is_file()
    sweep = [*given, "-m", "loss.limit=3,4", "launch.nproc=1", "name=swept"]
    mft(work, EXAMPLE, "train", *sweep, "--plugin", "mft_example")
    (folder,) = (work / "multirun" / "swept").glob("*")
    assert json.loads((folder / "sweep.json").read_text())["plugins"] == ["mft_example"]
    for job in folder.glob("*/summary.json"):
        shutil.rmtree(job.parent)
    mft(work, EXAMPLE, "sweep", "resume", str(folder))
    assert len([*folder.glob("*/losses.tsv")]) == 2


def test_the_components_of_the_example_do_what_they_say(work: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(EXAMPLE))
    plugins.name(["mft_example"])
    said = refusal(work, "loss=clipped", "loss.limit=0")
    assert "loss.limit=0" in said
    assert "did you mean clipped?" in refusal(work, "loss=cliped")
    assert "mft_example.loss has no Clippedd; did you mean Clipped?" in refusal(
        work, "loss._target_=mft_example.loss.Clippedd"
    )
    assert "defined in mft.loss.means, outside of mft_example" in refusal(
        work, "loss._target_=mft_example.loss.TaskTokenMean"
    )
    cfg = compose_resolved(["model=tiny", "loss=clipped", "tracking=table"])
    assert build(cfg.loss, "loss").limit == 5.0 and build(cfg.tracking.table, "tracking.table").digits == 4


def test_a_config_frozen_with_the_key_of_earlier_versions_is_read(tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text("name: old\ntrain: {seed: 3, allow_targets: []}\n")
    assert load(tmp_path).train.seed == 3 and "allow_targets" not in load(tmp_path).train
