"""Compose a run from conf/ and the overrides, check it, and run it. The same command resumes it.

examples:
  mft train model.path=… data.paths=[dir1,dir2] peft=lora optimizer.lr=2e-4
  mft train experiment=demo train.max_steps=20
  mft train -m experiment=demo loss=token_mean,task_token_mean optimizer.lr=1e-4,2e-4      a sweep
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path

from mft.commands.arguments import Parser, Value, one_of, overrides_in
from mft.config import plugins
from mft.console.screen import say
from mft.errors import UserError

KEYS = "Every key of an option can be set: `mft train peft=lora --cfg job` shows them, conf/ explains them."


def parser() -> Parser:
    """Returns the command line of `mft train`."""
    line = Parser("train", "[KEY=VALUE …] [-m] [--cfg job] [--config-dir DIR]", __doc__, overrides=True)
    groups = [f"  {group:<11} {' · '.join(options)}" for group, options in group_table().items()]
    title = f"{line.epilog}\n\nconfig groups (GROUP=OPTION) and their options:"
    line.epilog = "\n".join([title, *groups, "", KEYS])
    line.switch("-m", "--multirun", help="a sweep: every combination of comma-separated values is a job")
    line.switch("--check", help="check everything, print what would run, and start nothing")
    line.switch("--dry-run", help="the same, and rehearse one run: data, memory, a step of a tiny model")
    line.option("--cfg -c", one_of("PART", "job", "hydra", "all"), "print the composed config and stop")
    line.switch("--resolve", help="with --cfg: interpolations replaced by their values")
    line.option("--package -p", Value("a package, such as train", "KEY"), "with --cfg: this part only")
    parts = one_of("PART", "all", "config", "defaults", "defaults-tree", "plugins", "searchpath")
    line.option("--info -i", parts, "print how Hydra composes the config and stop", nargs="?", const="all")
    line.switch("--hydra-help", help="print Hydra's own help")
    line.composing()
    return line


def group_table() -> dict[str, list[str]]:
    """Returns {config group: its options}, read from the folder names of conf/."""
    # The names of files say it: help and completion need not wait for Hydra.
    from mft.config.overrides import group_options
    from mft.config.schema import config_dir

    groups = sorted(path.name for path in config_dir().iterdir() if path.is_dir() and path.name != "local")
    return {group: group_options(group) for group in groups}


def command(arguments: Sequence[str]) -> None:
    """Trains, sweeps, or prints what was composed."""
    parsed = parser().parse(arguments)
    overrides, config_dirs = overrides_in(parsed.words), parsed.config_dir or []
    # Hydra's own application serves sweeps and what it prints; one run needs nothing but a composed config.
    if flags := hydra_flags(parsed):
        from mft.sweep.hydra_app import through_hydra

        through_hydra(overrides, config_dirs, flags, parsed.dry_run or parsed.check)
    else:
        run_one(overrides, config_dirs, parsed.dry_run or parsed.check, rehearses=not parsed.check)


def hydra_flags(parsed: argparse.Namespace) -> list[str]:
    """Returns the flags that Hydra's own application serves; UserError where they do not go together."""
    serving = [f"--{name}={value}" for name in ("cfg", "info") if (value := getattr(parsed, name))]
    serving += ["--hydra-help"] * parsed.hydra_help
    changing = ["--resolve"] * parsed.resolve
    changing += [f"--package={parsed.package}"] if parsed.package else []
    if len(serving) > 1:
        raise UserError(f"{' and '.join(serving)} print different things; give one of them.")
    if changing and not serving and not parsed.multirun:
        raise UserError(f"{changing[0]} needs --cfg job, whose output it changes.")
    if parsed.multirun and serving:
        raise UserError(f"{serving[0]} shows one run: leave out -m, or the values to sweep over.")
    if parsed.multirun:
        from mft.launch.placement import detect_rank

        if detect_rank() is not None:
            raise UserError(
                "A sweep (-m) starts the ranks of its jobs itself: run `mft train -m …` without torchrun, "
                "accelerate launch or srun, or one job at a time with them."
            )
    return ["-m"] * parsed.multirun + serving + changing


def run_one(
    overrides: list[str], config_dirs: Sequence[Path], dry_run: bool, rehearses: bool = False
) -> None:
    """Checks one run and starts it. Under torchrun or srun this process is one of its ranks; rank 0 alone
    checks.

    dry_run: start nothing; rehearses: then also rehearse the run.
    """
    from mft.config.compose import compose_resolved
    from mft.config.given_keys import given_keys
    from mft.config.inert import without_effect
    from mft.config.overrides import key_of, of_hydra, replaced, with_output_dir
    from mft.launch import job, resume_choice
    from mft.launch.launch import follow_rank0, launch_command
    from mft.launch.placement import detect_rank, refusing_for_all

    if (placed := detect_rank()) is not None and placed.rank > 0:
        if not dry_run:
            follow_rank0()
        return
    # The other ranks wait for a run folder: whatever is refused from here on has to be refused for them, too.
    with nullcontext() if dry_run else refusing_for_all():
        overrides = with_output_dir(overrides)
        plugins.name(recorded_plugins(overrides))  # a resumed run needs no --plugin again
        cfg = compose_resolved(overrides, config_dirs)
        search = [str(folder.resolve()) for folder in config_dirs]
        checked = job.checked(cfg, overrides, starts=not dry_run, search=search)
        inert = without_effect(checked.cfg, checked.world, given_keys(overrides, config_dirs))
        for note in [*replaced(overrides), *of_hydra(overrides, sweep=False), *inert]:
            say(f"mft: {note}", sys.stderr)
        dated = not any(key_of(override) == "output_dir" for override in overrides)
        if not dry_run:
            launch_command(checked, dated)
            return
    folder, resumes = checked.choose(dated)
    finished = resume_choice.is_finished(folder, checked.identity, cfg.train.resume)
    if rehearses and not finished:
        from mft.rehearsal.child import rehearse

        say("checked: settings, files, what must fit together")
        rehearse(checked)
    state = "already finished" if finished else "would resume" if resumes else "would run"
    say(f"{folder}: {state}; nothing was started")


def recorded_plugins(overrides: Sequence[str]) -> list[str]:
    """Returns the packages recorded in the run folder that the command line names to be resumed."""
    from mft import run_folder

    pairs = [override.partition("=") for override in overrides]
    folders = [Path(value).expanduser() for key, _, value in pairs if key in ("output_dir", "train.resume")]
    return [package for folder in folders for package in run_folder.plugins_of(folder)]
