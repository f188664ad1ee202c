"""The error about ranks that did not come, and how a collective says that it has waited in vain."""

from __future__ import annotations

import re
import time
from collections.abc import Sequence

from mft.errors import UserError

TIMED_OUT = re.compile(
    r"Timed out waiting \d+ ?ms|Application timeout caused|collective operation timeout", re.IGNORECASE
)
"""The texts of collectives that timed out: gloo's, in either of two ranks, and that of NCCL's watchdog."""


class Stalled(UserError):
    """Ranks did not come for longer than is allowed. Attributes are plain values, for a report in JSON."""

    exit_code = 1

    def __init__(self, ranks: Sequence[int], since: float, limit: str, silent: bool, world: int):
        """ranks: empty where nobody can tell; since: seconds since 1970; limit: as a person would set it;
        silent: whether they gave no sign of life either; world: number of all ranks."""
        self.ranks, self.since, self.limit, self.silent, self.world = list(ranks), since, limit, silent, world
        numbers = " and ".join(map(str, self.ranks))
        who = f"ranks {numbers} have" if len(ranks) > 1 else f"rank {numbers} has" if ranks else "a rank has"
        how = "no sign of life" if silent else "other ranks have waited in vain"
        when = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(since))
        super().__init__(
            f"{who} stalled: {how} since {when}, longer than {limit}. The stacks of all ranks that still ran "
            "are in log/rank<r>.log of the run folder. What was saved is intact: the same command resumes."
        )
