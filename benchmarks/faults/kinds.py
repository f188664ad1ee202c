"""All kinds of faults: a name, how it strikes, and how often it is dealt."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from benchmarks.faults import damages, kills, limits, places, servers, sweeps
from benchmarks.faults.case import Case


@dataclass(frozen=True)
class Kind:
    """A kind of fault. `strike` brings a case into a state from which the same command has to finish it."""

    name: str
    strike: Callable[[Case], None]
    share: int = 1
    """How many cards of the deck are of this kind."""
    case: type[Case] = Case
    """What it strikes: a run or a sweep."""
    possible: Callable[[], bool] = lambda: True
    """Whether it can be played on this machine, by this user."""

    @property
    def explained(self) -> str:
        """What is done and what is expected, in a sentence."""
        return " ".join((self.strike.__doc__ or "").split())


KINDS = (
    Kind("kill launcher", kills.kill_launcher, 8),
    Kind("kill rank", kills.kill_rank, 8),
    Kind("kill group", kills.kill_group, 8),
    Kind("kill twice", kills.kill_twice, 3),
    Kind("signal launcher", kills.signal_launcher, 7),
    Kind("signal group", kills.signal_group, 7),
    Kind("signal rank", kills.signal_rank, 5),
    Kind("damage newest checkpoint", damages.newest_checkpoint, 8),
    Kind("damage all checkpoints", damages.all_checkpoints, 2),
    Kind("lose checkpoints", damages.checkpoints_gone),
    Kind("damage metrics", damages.metrics, 3),
    Kind("tear last row", damages.torn_row, 2),
    Kind("damage identity", damages.identity, 2),
    Kind("damage records", damages.records, 4),
    Kind("damage summary", damages.summary, 2),
    Kind("damage final", damages.final, 2),
    Kind("damage sample losses", damages.sample_losses, 2),
    Kind("damage report", damages.report),
    Kind("damage cache", damages.token_cache, 4),
    Kind("damage base model", damages.base_model, 2),
    Kind("change data", damages.data_changed, 2),
    Kind("full disk", places.full_from_the_start, 6, possible=places.mountable),
    Kind("disk fills", places.full_later, 5, possible=places.mountable),
    Kind("read-only folder", places.read_only, 5),
    Kind("clock jump", limits.clock, 2),
    Kind("few file handles", limits.handles, 3),
    Kind("file size limit", limits.file_size, 3),
    Kind("bad tracker", servers.bad_server, 4),
    Kind("bad tracker on resume", servers.server_for_resume, 2),
    Kind("tracker dies", servers.server_dies, 1),
    Kind("damage tracker files", servers.tracker_files, 2),
    Kind("start twice", sweeps.run_twice, 2),
    Kind("kill sweep", sweeps.killed, 5, sweeps.SweepCase),
    Kind("signal sweep", sweeps.stopped, 3, sweeps.SweepCase),
    Kind("start sweep twice", sweeps.twice, 1, sweeps.SweepCase),
    Kind("damage sweep", sweeps.damaged, 3, sweeps.SweepCase),
    Kind("lose a job", sweeps.job_lost, 1, sweeps.SweepCase),
    Kind("change data of sweep", sweeps.data_changed, 1, sweeps.SweepCase),
)
