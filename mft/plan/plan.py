"""The plan of a case: memory, whether it fits, and how long it takes."""

from __future__ import annotations

from dataclasses import dataclass

from mft.estimate.memory import USABLE
from mft.estimate.rank import RankMemory
from mft.estimate.skeletons import Skeleton
from mft.plan.case import Case
from mft.plan.data import DataPlan
from mft.plan.memory import largest, needed, on_host, peak, room, with_rows
from mft.plan.rates import Rate
from mft.plan.time import StepTime, step_time


@dataclass(frozen=True)
class Plan:
    """What a case needs."""

    case: Case
    """With a number of rows in a micro-batch, also where that is auto."""
    skeleton: Skeleton
    memory: RankMemory
    time: StepTime
    """As `step_time` has it; the config's own seconds are those of `seconds`."""
    tokens: float
    """Of a step, over all ranks."""

    @property
    def every(self) -> int:
        """Of so many layers one is recomputed, 0 = none."""
        return self.memory.every

    @property
    def room(self) -> float:
        """Bytes of the device that are counted on."""
        return room(self.case)

    @property
    def peak(self) -> float:
        """The most that a rank takes of its device."""
        return peak(self.case, self.memory)

    @property
    def on_host(self) -> float:
        """The most that the ranks of a machine take of its memory; 0 where that is their device."""
        return on_host(self.case, self.memory)

    @property
    def host_fits(self) -> bool:
        """Whether a machine has that; also where its memory is not known."""
        return self.case.host is None or self.on_host <= USABLE * self.case.host

    @property
    def fits(self) -> bool:
        """Whether the device and the machine have room for the most that is taken of them."""
        return self.peak <= self.room and self.host_fits

    def seconds(self, rate: Rate, of: Plan | None = None) -> float | None:
        """Returns the seconds of a step at a rate, None where nothing is known of it.

        of: the plan that the rate is of, None = this one; another one differs as `step_time` has it.
        """
        base = of or self
        if rate.tflops is not None:
            return base.time.flops / (rate.tflops * 1e12) * self.time.seconds / base.time.seconds
        return self.time.seconds if rate.words else None


def plan(of: Case, data: DataPlan | None, smallest: bool = False) -> Plan:
    """Returns the plan of a case.

    data: what it takes of its tasks, None = full rows; smallest: with all layers recomputed and one row in a
    micro-batch where these settings are auto.
    """
    if of.sizes.found:
        memory = needed(of, smallest)
    else:
        of, memory = (with_rows(of, 1), needed(of, True)) if smallest else largest(of)
    full = float(of.sizes.total * of.cfg.data.seq_length)
    tokens = data.tokens / max(1, data.steps) if data else full
    return Plan(of, of.skeleton, memory, step_time(of, memory.every, tokens), tokens)
