"""The whole answer: the config on each of the devices, what it takes of its data, and advice."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from mft.distributed.ddp import Single
from mft.estimate.skeletons import Skeletons
from mft.hardware import quiet_libraries
from mft.plan.advice import Advice, Advisor
from mft.plan.case import Case, case, composed
from mft.plan.data import DataPlan, data_plan
from mft.plan.gpus import Device
from mft.plan.plan import Plan, plan
from mft.plan.rates import Rate, rate


@dataclass(frozen=True)
class Outcome:
    """What comes of the config on a device."""

    plan: Plan
    rate: Rate
    data: DataPlan | None
    advice: list[Advice] | None
    """None where it fits, or where another device was found that it fits on."""

    @property
    def seconds(self) -> float | None:
        """Of a step, None where nothing is known of the device's speed."""
        return self.plan.seconds(self.rate)

    @property
    def run_seconds(self) -> float | None:
        """Of all steps, without validating and saving."""
        return None if self.data is None or self.seconds is None else self.seconds * self.data.steps


@dataclass(frozen=True)
class Answer:
    """The result of `mft plan`."""

    overrides: list[str]
    options: list[str]
    """Flags of the command line that choose yaml files and plug-ins."""
    outcomes: list[Outcome]
    data: DataPlan | None
    notes: list[str]
    """What is missing for more."""

    @property
    def shown(self) -> Outcome:
        """The one whose parts are shown: the first that fits, else the one that comes nearest."""
        ratio = [outcome.plan.peak / max(1.0, outcome.plan.room) for outcome in self.outcomes]
        fitting = next((outcome for outcome in self.outcomes if outcome.plan.fits), None)
        return fitting or self.outcomes[ratio.index(min(ratio))]

    def choice(self, group: str) -> str:
        """Returns the option that was chosen in a config group."""
        return str(self.outcomes[0].plan.case.cfg.choices.get(group, ""))


def answer(
    overrides: Sequence[str],
    devices: Sequence[Device],
    asked: bool,
    tflops: float | None = None,
    host: float | None = None,
    config_dirs: Sequence[Path] = (),
    plugins: Sequence[str] = (),
) -> Answer:
    """Returns the answer for a command line.

    devices: what it is planned for; asked: whether each of them has to fit, else they are a choice, and there
    is advice, for the last, only where it fits on none; tflops: of a device, None = measured or assumed;
    host: bytes of a machine's memory, None = not known.
    Raises UserError as `mft train` would.
    """
    cfg = composed(overrides, config_dirs)
    skeletons = Skeletons()
    cases = [case(cfg, device, host, skeletons) for device in devices]
    quiet_libraries()  # not before: it imports transformers, and a mistake is to be reported at once
    data_of: dict[int, DataPlan | None] = {}
    outcomes = []
    for each in cases:
        total = each.sizes.total
        if total not in data_of:
            data_of[total] = data_plan(each)
        made = plan(each, data_of[total])
        speed = rate(each, tflops, made.skeleton.flops(0).model)
        outcomes.append(Outcome(made, speed, data_of[total], None))
    if not (any(outcome.plan.fits for outcome in outcomes) and not asked):
        outcomes = [
            outcome
            if outcome.plan.fits or not (asked or outcome is outcomes[-1])
            else _advised(outcome, overrides, config_dirs)
            for outcome in outcomes
        ]
    options = [word for folder in config_dirs for word in ("--config-dir", str(folder))]
    options += [word for package in plugins for word in ("--plugin", package)]
    return Answer(list(overrides), options, outcomes, outcomes[0].data, _notes(cases, outcomes))


def _advised(outcome: Outcome, overrides: Sequence[str], config_dirs: Sequence[Path]) -> Outcome:
    advisor = Advisor(overrides, config_dirs, outcome.plan, outcome.data)
    return Outcome(outcome.plan, outcome.rate, outcome.data, advisor.advice())


def _notes(cases: Sequence[Case], outcomes: Sequence[Outcome]) -> list[str]:
    notes = []
    if not cases[0].sizes.found:
        rows = [f"{each.plan.case.sizes.per_device} on {each.plan.case.device.shown}" for each in outcomes]
        notes.append(
            "train.per_device_batch_size=auto: the most rows by this estimate, which a run measures: "
            + ", ".join(rows)
        )
    if not cases[0].parts.tasks:
        notes.append(
            "No task is chosen: full rows are counted; data.paths=[…] adds tokens, steps and the run's time."
        )
    if max(each.world for each in cases) == 1 and not isinstance(cases[0].parts.dist, Single):
        notes.append("One rank is planned for: launch.nproc=8, or plan.gpu=8xH100, plans for eight.")
    return notes
