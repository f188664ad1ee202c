"""Predict whether a run fits, how long it takes, and what to change where it does not fit.

The overrides are those of `mft train`. Of the model a config.json is enough: a folder, or what the hub's
cache has; no weights are read, no GPU is used. Without data.paths or task=… full rows are counted.

By default the GPUs of this machine are planned for, or common ones where it has none. What is not measured is
called assumed, what is not counted about: docs/plan.md says how all of it is computed.

examples:
  mft plan model.path=… 'data.paths=[dir1,dir2]' peft=lora
  mft plan experiment=qlora_zero2 model.path=… plan.gpu=4xA100-40          also --gpu 4xA100-40
  mft plan model.path=… peft=full dist=fsdp dist.offload=true --gpu 8x40GiB,8xH100 --host 512GiB --json
"""

from __future__ import annotations

import gc
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from mft.commands.arguments import POSITIVE, Parser, Value, overrides_in
from mft.console.screen import console, say
from mft.errors import UserError, nearest, shortened

GPU = Value("names or sizes of GPUs such as H100, 8x80GiB or cpu", "GPU")
HOST = Value("a size such as 512GiB", "SIZE")


def parser() -> Parser:
    """Returns the command line of `mft plan`."""
    words = "[KEY=VALUE …] [--gpu GPU,…] [--tflops X] [--host SIZE] [--json] [--config-dir DIR]"
    line = Parser("plan", words, __doc__, overrides=True)
    about = (
        "what to plan for: H100, A100-40, 4090, …, a size as 80GiB, cpu; 8x in front for eight; repeatable"
    )
    line.option("--gpu", GPU, about, action="append")
    line.option("--tflops", POSITIVE, "TFLOP/s that a device reaches in training, for the time")
    line.option("--host", HOST, "memory of a machine, for what is offloaded and gathered there")
    line.switch("--json", help="print everything as JSON")
    line.composing()
    return line


def command(arguments: Sequence[str]) -> None:
    """Prints the plan of a command line."""
    parsed = parser().parse(as_flags(arguments or ["--help"]))
    overrides, config_dirs = overrides_in(parsed.words), parsed.config_dir or []
    from mft.plan.gpus import devices, host_memory

    planned_for, host = devices(parsed.gpu or ()), host_memory(parsed.host) if parsed.host else None
    asked = bool(parsed.gpu) or planned_for[0].visible
    with _uncollected():
        from mft.plan.answer import answer
        from mft.plan.as_json import as_json
        from mft.plan.report import parts_of

        result = answer(overrides, planned_for, asked, parsed.tflops, host, config_dirs, parsed.plugin or ())
    if parsed.json:
        say(as_json(result))
        return
    terminal = console()
    for part, unfolded in parts_of(result, terminal.width):
        terminal.print(part, soft_wrap=unfolded)


@contextmanager
def _uncollected() -> Iterator[None]:
    """Pauses Python's search for cycles of garbage, which takes a quarter of a plan's time: imports and models
    without weights make millions of objects that stay."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


def as_flags(arguments: Sequence[str]) -> list[str]:
    """Returns the arguments with plan.gpu=H100, as it may be written beside overrides, as --gpu=H100."""
    keys, words = ("plan.gpu", "plan.tflops", "plan.host"), []
    for word in arguments:
        if word in ("-m", "--multirun"):
            raise UserError(f"{word}: a plan is of one run; plan the largest job of a sweep, without {word}.")
        key, equals, value = word.partition("=")
        if not (equals and re.fullmatch(r"\+{0,2}plan(\..*)?", key)):
            words.append(word)
        elif key in keys:
            words.append(f"--{key.removeprefix('plan.')}={value}")
        else:
            raise UserError(
                f"{shortened(word)[1:-1]}: unknown{nearest(key, keys) or '.'} Allowed: {', '.join(keys)}."
            )
    return words
