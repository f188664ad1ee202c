"""The cells of `mft verify-resume`: every combination of comma-separated values, composed and checked."""

from __future__ import annotations

import itertools
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from omegaconf import DictConfig

from mft.config.compose import compose_resolved
from mft.config.inputs import under
from mft.config.overrides import check_overrides, key_of
from mft.config.schema import LaunchMode
from mft.console.screen import say
from mft.errors import UserError
from mft.hardware import visible_gpus
from mft.launch.job import Job, checked
from mft.sweep.composer import NEWS_SECONDS

DECIDED = {
    "output_dir": "the runs go to a temporary folder, or to --keep DIR",
    "tracking": "nothing is sent to a tracker",
    "train.max_steps": "--steps is the length of the runs",
    "train.log_every": "every step is logged",
    "train.resume": "both runs begin anew",
    "launch.mode": "a resume takes new processes",
}
"""Key that the command sets by itself → why what the user gave is not used."""

DEFAULT_RANKS = 2
"""Ranks of a backend for several, where launch.nproc is not given and there is no GPU."""


@dataclass(frozen=True)
class Cell:
    """One combination of values."""

    overrides: tuple[str, ...]
    """The command line with one value for each key."""
    label: str
    """The overrides by which it differs from the other cells."""
    job: Job | None = None
    """None: the config was refused."""
    refusal: str = ""
    """Why it was refused, in a sentence."""


def check_all(overrides: Sequence[str], config_dirs: Sequence[Path], steps: int) -> list[Cell]:
    """Returns the cells of a command line, each composed and checked; a mistake in one refuses that one.

    steps: length of the runs. Raises UserError for what cannot be read as overrides.
    """
    cells, reported = [], time.monotonic()
    combinations = combined(overrides)
    for number, (given, label) in enumerate(combinations, start=1):
        try:
            cell = Cell(given, label, checked_job(given, config_dirs, steps))
        except UserError as error:
            cell = Cell(given, label, refusal=str(error))
        cells.append(cell)
        if number < len(combinations) and time.monotonic() - reported > NEWS_SECONDS:
            reported = time.monotonic()
            say(f"checking cells: {number} of {len(combinations)}")
    return cells


def combined(overrides: Sequence[str]) -> list[tuple[tuple[str, ...], str]]:
    """Returns (overrides, label) of every combination of the values that overrides sweep over."""
    from hydra.core.override_parser.overrides_parser import OverridesParser

    check_overrides(overrides)
    choices, swept = [], []
    for override in OverridesParser.create().parse_overrides(list(overrides)):
        written = str(override.input_line)
        if not override.is_sweep_override():
            choices.append([written])
        elif not override.is_discrete_sweep() or "glob(" in written:
            raise UserError(f"{written}: expected values separated by commas, or choice(…) or range(…).")
        else:
            swept.append(len(choices))
            key = override.get_key_element()
            choices.append([f"{key}={value}" for value in override.sweep_string_iterator()])
    chosen = itertools.product(*choices)
    return [(given, " ".join(given[place] for place in swept) or "(all as given)") for given in chosen]


def not_used(overrides: Sequence[str]) -> list[str]:
    """Returns a sentence for every override of a key that the command sets by itself."""
    keys = [(o, key_of(o).replace("/", ".")) for o in overrides]
    return [
        f"{override} has no effect: {why}."
        for override, key in keys
        for own, why in DECIDED.items()
        if under(key, [own]) or (override == "launch=inline" and own == "launch.mode")
    ]


def checked_job(overrides: Sequence[str], config_dirs: Sequence[Path], steps: int) -> Job:
    """Returns the checked job of one cell, with the settings that the command decides."""
    cfg = compose_resolved(overrides, config_dirs)
    if cfg.launch.nnodes > 1:
        raise UserError(f"launch.nnodes={cfg.launch.nnodes}: mft verify-resume runs on one machine.")
    cfg.tracking, cfg.launch.mode = {}, LaunchMode.processes
    cfg.train.max_steps, cfg.train.log_every, cfg.train.resume = steps, 1, "auto"
    if cfg.launch.nproc == "auto":
        cfg.launch.nproc = ranks_of(cfg.dist)
    search = [str(folder.resolve()) for folder in config_dirs]
    return checked(cfg, overrides, starts=False, search=search)


def ranks_of(dist: DictConfig) -> int:
    """Returns the number of ranks where launch.nproc is not given: several, if the backend is for several."""
    single = str(dist.get("_target_")) == "mft.distributed.ddp.Single"
    return 1 if single else visible_gpus() or DEFAULT_RANKS
