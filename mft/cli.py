"""The `mft` command. Heavy imports stay inside functions: help and config errors answer within about a second."""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from mft import __version__
from mft.config import plugins
from mft.console.screen import guard_logs, say
from mft.console.streams import steady, unread
from mft.errors import UserError, full_disk, nearest, no_path, printable, shortened

HELP = """\
mft: fine-tune large language models on several tasks at once

  mft train [overrides]           compose a run from conf/, check it, run it   (-m sweeps, --cfg job prints)
  mft data report [overrides]     what becomes of every task's rows (also: show, the samples; prepare, tokenise now)
  mft sweep resume DIR            resume an interrupted sweep
  mft runs [DIR …]                runs and sweeps: state, age, best loss, folder
  mft show RUN                    a run's config beside the defaults, its losses, its files
  mft compare DIR                 ranked table and HTML report of a sweep (or of an MLflow experiment)
  mft tracking sync [DIR …]       send what MLflow has missed; mark runs that were killed
  mft merge RUN                   merge a run's adapter into its base model, and check the logits
  mft merge base=… adapter=… out=…
  mft convert FOLDER              write a model's pickled weights as safetensors
  mft convert model=qwen model.path=… out=…    write an original checkpoint as a native folder
  mft generate RUN "a question"   answer a prompt, encoded as in training
  mft demo                        make the demo's model and its five code tasks, once, in the cache folder

  mft COMMAND --help says more. Start here: mft demo && mft train experiment=demo
"""

CONVERT_HELP = """\
mft convert FOLDER
mft convert model=FAMILY model.path=FOLDER out=NATIVE
mft convert model.path=QUANTISED out=PLAIN

  With a folder alone: writes its pytorch_model*.bin files as model*.safetensors beside them. They are read as tensors
  and plain containers alone: a file that would run code is refused.

  With a family of an original format (chatglm2, chatglm3, codegeex2, qwen, baichuan, aquila2, …; see conf/model):
  writes the checkpoint as a native folder that transformers loads by itself. Adapters trained on the one work on the
  other. A run needs no such step: it converts into the cache when the checkpoint is first used.

  With a checkpoint that is quantised (fp8, mxfp4, bitsandbytes, compressed-tensors): writes its weights dequantised, in
  the dtype that its config.json names.
"""

TRAIN_HELP = """\
mft train [overrides] [-m] [--cfg job] [--config-dir DIR]

  mft train model.path=… data.paths=[dir1,dir2] peft=lora optimizer.lr=2e-4
  mft train experiment=demo train.max_steps=20
  mft train -m experiment=demo loss=token_mean,task_token_mean optimizer.lr=1e-4,2e-4      a sweep: every combination

  -m, --multirun      comma-separated values are swept
  --dry-run           say what would run, with all jobs checked, and start nothing
  --cfg job           print the composed config (--resolve: with interpolations replaced)
  --config-dir DIR    a folder of your own yaml files beside conf/ (task/mine.yaml, experiment/mine.yaml, …)
  --plugin PACKAGE    a Python package of your own components (a loss, a format, …), which yaml files may then name

Config groups (GROUP=OPTION) and their options:
{groups}

Every key of an option can be set: `mft train peft=lora --cfg job` shows them, conf/ explains them.
"""

COMMANDS = {
    "train": "mft.cli:train",
    "merge": "mft.cli:merge",
    "convert": "mft.cli:convert",
    "generate": "mft.cli:generate",
    "sweep": "mft.sweep.hydra_app:command",
    "compare": "mft.runs.compare:command",
    "runs": "mft.commands.runs:runs",
    "show": "mft.commands.runs:show",
    "tracking": "mft.commands.runs:tracking",
    "data": "mft.commands.data:data",
    "demo": "mft.cli:demo",
}
"""Command -> module:function(arguments); imported only when it is asked for."""

WRITE = ("train", "sweep", "tracking", "merge", "convert", "demo")
"""Commands whose work is not what they print: they finish it when nobody reads their output any more."""

BUILDING = ("train", "sweep", "data", "merge", "convert", "generate")
"""Commands that may build components of a plug-in, and take --plugin."""

GENERATE_OPTIONS: dict[str, Any] = {
    "base": "",
    "max_new_tokens": 512,
    "top_p": 0.95,
    "temperature": 0.1,
    "do_sample": True,
    "num_beams": 1,
    "repetition_penalty": 1.0,
    "system": "",
    "seed": 0,
    "trust_remote_code": False,
}

MERGE_OPTIONS: dict[str, Any] = {"base": "", "adapter": "", "out": "", "trust_remote_code": False}


def main(arguments: Sequence[str] | None = None) -> None:
    """Entry point of the console script; exits with 0, 1 (an error), 2 (a wrong command line), 75, 130 or 143."""
    args = list(sys.argv[1:] if arguments is None else arguments)
    steady(lasting=bool(args) and args[0] in WRITE)
    try:
        _main(args)
        if sys.__stdout__ is not None and sys.stdout is sys.__stdout__:
            sys.__stdout__.flush()  # here, where a pipe that was closed meanwhile is no traceback
    except BrokenPipeError:
        unread()


def _main(args: list[str]) -> None:
    if not args or args[0] in ("-h", "--help", "help"):
        print(HELP, end="")
        return
    if args[0] in ("-V", "--version", "version"):
        print(f"mft {__version__}")
        return
    guard_logs()
    try:
        os.getcwd()
    except FileNotFoundError:
        fail("The current folder no longer exists; change to another one.", 2)
    try:
        if args[0] not in COMMANDS:
            known = ", ".join(COMMANDS)
            fail(f"unknown command {shortened(args[0])}{nearest(args[0], COMMANDS) or '.'} Commands: {known}.", 2)
        if args[0] in BUILDING:
            args = plugins.taken(args)
        module, _, function = COMMANDS[args[0]].partition(":")
        getattr(importlib.import_module(module), function)(args[1:])
    except UserError as error:
        fail(str(error), error.exit_code)
    except Exception as error:
        if told := full_disk(error):
            fail(str(told))
        if told := no_path(error):
            fail(str(told), told.exit_code)
        if type(error).__name__ != "WorkerError":  # which carries the traceback of the rank that failed, not ours
            raise
        fail(str(error))
    except KeyboardInterrupt as stopped:
        sys.exit(getattr(stopped, "code", 130))  # signals.Stopped knows whether there is a checkpoint to resume from


def fail(message: str, code: int = 1) -> None:
    """Prints one error for a person and exits."""
    say(f"mft: {message}", sys.stderr)
    sys.exit(code)


def train(args: list[str]) -> None:
    """mft train: see TRAIN_HELP."""
    if "-h" in args or "--help" in args:
        print(TRAIN_HELP.format(groups=config_groups()), end="")
        return
    dry_run = "--dry-run" in args
    overrides, config_dirs, hydra_flags = split_flags([arg for arg in args if arg != "--dry-run"])
    from mft.config.compose import compose_resolved
    from mft.config.inert import given_keys, without_effect
    from mft.config.overrides import key_of, of_hydra, replaced, with_output_dir

    if hydra_flags and not {"-m", "--multirun", "--hydra-help"} & set(hydra_flags):
        alone = [flag for flag in hydra_flags if flag == "--resolve" or flag.startswith("--package")]
        if len(alone) == len(hydra_flags):
            raise UserError(f"{alone[0]} needs --cfg job, whose output it changes.")
    if {"-m", "--multirun"} & set(hydra_flags):
        from mft.launch.placement import detect_rank

        if detect_rank() is not None:
            raise UserError(
                "A sweep (-m) starts the ranks of its jobs itself: run `mft train -m …` without torchrun, accelerate "
                "launch or srun, or one job at a time with them."
            )
    if hydra_flags:
        from mft.sweep.hydra_app import through_hydra

        through_hydra(overrides, config_dirs, hydra_flags, dry_run)
        return
    from mft.launch import job, resume_choice
    from mft.launch.launch import launch_command
    from mft.launch.placement import detect_rank

    overrides = with_output_dir(overrides)
    plugins.name(known_plugins(overrides))
    cfg = compose_resolved(overrides, config_dirs)
    checked = job.checked(cfg, overrides, starts=not dry_run)
    placed = detect_rank()
    if placed is None or placed.rank == 0:
        inert = without_effect(cfg, checked.world, given_keys(overrides, config_dirs))
        for note in [*replaced(overrides), *of_hydra(overrides, sweep=False), *inert]:
            say(f"mft: {note}", sys.stderr)
    dated = not any(key_of(o) == "output_dir" for o in overrides)
    if dry_run:
        if placed is not None and placed.rank > 0:
            return
        folder, goes_on = checked.choose(dated)
        done = resume_choice.is_finished(folder, checked.identity, cfg.train.resume)
        say(
            f"{folder}: {'finished already' if done else 'would go on' if goes_on else 'would run'}; "
            "nothing was started"
        )
        return
    launch_command(checked, dated)


def known_plugins(overrides: Sequence[str]) -> list[str]:
    """Returns the packages recorded in the run folder that the command line names to be resumed."""
    from mft import run_folder

    given = [o.partition("=") for o in overrides]
    folders = [Path(value).expanduser() for key, _, value in given if key in ("output_dir", "train.resume")]
    return [package for folder in folders for package in run_folder.plugins_of(folder)]


def split_flags(args: Sequence[str]) -> tuple[list[str], list[Path], list[str]]:
    """Returns (overrides, --config-dir folders, the flags that Hydra itself has to serve)."""
    from mft.config.overrides import not_an_override, unknown_flag

    overrides, config_dirs, flags = [], [], []
    rest = list(args)
    while rest:
        arg = rest.pop(0)
        name, equals, value = arg.partition("=")
        if name in ("--config-dir", "-cd"):
            if not equals and not rest:
                raise UserError("--config-dir needs a folder.")
            config_dirs.append(Path(value if equals else rest.pop(0)))
        elif name in ("--cfg", "-c", "--info", "-i", "--package", "-p"):
            flags += flag_with_value(arg, rest)
        elif arg in ("-m", "--multirun", "--resolve", "--hydra-help"):
            flags.append(arg)
        elif arg.startswith("-") and not arg.lstrip("-")[:1].isdigit():
            raise UserError(unknown_flag(arg, FLAGS))
        elif "=" not in arg and not arg.startswith("~"):
            raise UserError(not_an_override(arg))
        else:
            overrides.append(arg)
    return overrides, config_dirs, flags


FLAGS = (
    "-m",
    "--multirun",
    "--dry-run",
    "--cfg",
    "--resolve",
    "--package",
    "--info",
    "--config-dir",
    "--plugin",
    "--help",
)

FLAG_VALUES = {
    "--cfg": ("job", "hydra", "all"),
    "--info": ("all", "config", "defaults", "defaults-tree", "plugins", "searchpath"),
    "--package": (),
}
"""Flags that Hydra serves with a value → the values it knows, () for any."""


def flag_with_value(arg: str, rest: list[str]) -> list[str]:
    """Returns a flag of FLAG_VALUES with its value, which may be the next word and is then taken out of `rest`."""
    flag, equals, value = arg.partition("=")
    flag = next(long for long in FLAG_VALUES if flag in (long, long[1:3]))
    values = FLAG_VALUES[flag]
    if not equals and rest and rest[0][:1] != "-" and "=" not in rest[0]:
        value = rest.pop(0)
    if not value and flag == "--info":
        return [flag]
    if not value or (values and value not in values):
        known = f"one of {', '.join(values)}" if values else "a package, such as train"
        raise UserError(f"{flag}{f'={value}' if value else ''} needs {known}{nearest(value, values) or '.'}")
    return [f"{flag}={value}"]


def config_groups() -> str:
    """Returns a line per config group with its options, read from the folder names."""
    from mft.config.overrides import group_options
    from mft.config.schema import config_dir

    groups = sorted(p.name for p in config_dir().iterdir() if p.is_dir() and p.name != "local")
    return "\n".join(f"  {group:<11} {' · '.join(group_options(group))}" for group in groups)


def options(args: Sequence[str], allowed: Mapping[str, Any]) -> tuple[dict[str, Any], list[str]]:
    """Splits arguments into key=value options, typed like their defaults, and the rest; refuses unknown keys."""
    values, rest = dict(allowed), []
    for arg in args:
        key, equals, text = arg.partition("=")
        if not equals or not key.isidentifier():
            rest.append(arg)
            continue
        if key not in allowed:
            raise UserError(f"Unknown option {key!r}{nearest(key, allowed) or '.'} Options: {', '.join(allowed)}.")
        values[key] = _typed(key, text, allowed[key])
    return values, rest


def _typed(key: str, text: str, default: Any) -> Any:
    if isinstance(default, bool):
        if text.lower() not in ("true", "false"):
            raise UserError(f"{key}={text} must be true or false.")
        return text.lower() == "true"
    try:
        return type(default)(text)
    except ValueError:
        raise UserError(f"{key}={text} must be a number, for example {key}={default}.") from None


def final_folder(run: str) -> Path:
    """Returns where a run's model is: its `final`, else its newest sound checkpoint, else the folder itself.

    Raises UserError where it is damaged, with what to use in its place.
    """
    from mft.files.checksums import require_sound
    from mft.model.generate import model_folder

    folder = Path(run)
    if not folder.is_dir():
        siblings = [p.name for p in folder.parent.iterdir()] if folder.parent.is_dir() else []
        raise UserError(f"{run} is not a folder{nearest(folder.name, siblings) or '.'}")
    from mft.training.resume import all_damaged, newest_sound

    if (folder / "final").is_dir():
        try:
            require_sound(folder / "final")
        except UserError as error:
            checkpoint, _ = newest_sound(folder)
            other = f" {checkpoint} is sound; train.resume={checkpoint} writes final/ anew." if checkpoint else ""
            raise UserError(f"{error}{other}") from error
        return model_folder(folder)
    checkpoint, damaged = newest_sound(folder)
    if checkpoint is None and damaged:
        raise all_damaged(folder, damaged)
    for name, problem in damaged.items():
        print(f"mft: {name} is damaged and passed over: {problem}", file=sys.stderr)
    return model_folder(checkpoint or folder)


def know_family(run: str) -> None:
    """Imports the model family of a run where it is a plug-in's, since it may register an architecture."""
    from mft import run_folder
    from mft.config.components import component_class, inside
    from mft.config.schema import load

    folder = Path(run)
    if run_folder.plugins_of(folder) or plugins.allowed():
        model = load(folder).model if (folder / "config.yaml").is_file() else {}
        if not inside(str(model.get("_target_", "mft")), "mft"):
            plugins.name(run_folder.plugins_of(folder))
            component_class(model, "model")


def merge(args: list[str]) -> None:
    """mft merge RUN [out=…]  |  mft merge base=… adapter=… out=…"""
    if "-h" in args or "--help" in args or not args:
        print(f"{merge.__doc__}\n\n  Writes a plain Hugging Face folder and compares its logits with base + adapter.")
        return
    values, rest = options(args, MERGE_OPTIONS)
    if len(rest) > 1:
        raise UserError(f"mft merge takes one run folder, got {' '.join(rest)}; where to write it is out=….")
    from mft.hardware import quiet_libraries
    from mft.model.merge import merge as merge_adapter

    quiet_libraries()
    if rest:
        know_family(rest[0])
        adapter = final_folder(rest[0])
        out = Path(values["out"] or Path(rest[0]) / "merged")
    else:
        missing = [key for key in ("adapter", "out") if not values[key]]
        if missing:
            raise UserError(f"mft merge needs {' and '.join(k + '=…' for k in missing)}, or a run folder.")
        adapter, out = Path(values["adapter"]), Path(values["out"])
    result = merge_adapter(adapter, out, base=values["base"] or None, trust_remote_code=values["trust_remote_code"])
    say(f"merged into {out}\n{result}")


def convert(args: list[str]) -> None:
    """mft convert: see CONVERT_HELP."""
    if "-h" in args or "--help" in args or not args:
        print(CONVERT_HELP, end="")
        return
    if len(args) == 1 and "=" not in args[0]:
        from mft.model.legacy.pickled import convert as convert_pickled

        for file in convert_pickled(Path(args[0]).expanduser()):
            say(file)
        return
    overrides = [arg for arg in args if not arg.startswith("out=")]
    out = next((arg.removeprefix("out=") for arg in args if arg.startswith("out=")), "")
    from mft.config.compose import compose_resolved
    from mft.config.overrides import key_of

    other = [arg for arg in overrides if "=" not in arg or key_of(arg).partition(".")[0] != "model"]
    if other or not out or len(overrides) + 1 < len(args):
        raise UserError(f"mft convert takes a folder alone, or model=…, model.… and out=…, got {' '.join(args)}.")
    from mft.config.build import component
    from mft.model.export import save_native
    from mft.model.legacy.original import Original

    family = component(compose_resolved(overrides), "model")
    family.check()
    if not isinstance(family, Original) and not family.weight_format().method:
        raise UserError(
            f"{' '.join(overrides)} is neither quantised nor in an original format, so there is nothing to convert: "
            "its checkpoints are native already."
        )
    save_native(family, Path(out).expanduser())
    say(f"written to {out}")


def generate(args: list[str]) -> None:
    """mft generate RUN "prompt" ["prompt" …] [max_new_tokens=512 top_p=0.95 temperature=0.1 do_sample=true \
num_beams=1 repetition_penalty=1.0 system=… seed=0 base=… trust_remote_code=false]

  base=…: where the base model of an adapter is, if it has moved since the training"""
    if "-h" in args or "--help" in args or not args:
        print(generate.__doc__)
        return
    values, rest = options(args, GENERATE_OPTIONS)
    if len(rest) < 2:
        raise UserError(
            'mft generate needs a run folder and at least one prompt: mft generate outputs/demo/… "def quick_sort(".'
        )
    from mft.data.tokenize import Encoder
    from mft.hardware import quiet_libraries
    from mft.model.generate import Answerer, check_options

    names = ("max_new_tokens", "top_p", "temperature", "num_beams", "repetition_penalty")
    check_options(**{name: values[name] for name in names})
    quiet_libraries()
    know_family(rest[0])
    values["system"] = values["system"] or None
    own_code = values.pop("trust_remote_code")
    base = values.pop("base") or None
    answerer = Answerer(final_folder(rest[0]), Encoder.saved, base=base, trust_remote_code=own_code)
    answers = answerer.answer(rest[1:], **values)
    steered = sys.stdout.isatty()  # a file or another program gets the answer as it is
    for number, answer in enumerate(printable(answer) if steered else answer for answer in answers):
        print(f"── {rest[1 + number]}\n{answer}" if len(answers) > 1 else answer)


def demo(args: list[str]) -> None:
    """mft demo: makes the demo's model and its five code tasks in the cache folder; the second call returns at once."""
    if "-h" in args or "--help" in args:
        print(demo.__doc__)
        return
    if args:
        raise UserError(f"mft demo takes no arguments, got {' '.join(args)}; the cache folder is $MFT_CACHE.")
    from mft.config.schema import default_cache_dir
    from mft.demo import describe, make

    cache_dir = Path(default_cache_dir())
    folder = make(cache_dir, progress=print)
    for row in describe(cache_dir):
        print("  ".join(str(cell) for cell in row))
    print(f"the demo's input is in {folder}; train on it with: mft train experiment=demo")


if __name__ == "__main__":
    main()
