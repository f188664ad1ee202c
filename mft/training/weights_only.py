"""Checkpoints that hold the weights alone: what is left of the older ones with train.save_state=last.

Such a one has the model and the trained parameters, but neither the optimizer's numbers nor the random
states, so no run can be resumed from it. Its COMPLETE lists what it holds and tells by that what it is.
"""

from __future__ import annotations

import re
from pathlib import Path

from mft.files.checksums import COMPLETE, listed, seal

RESUME_ONLY = re.compile(r"state/(optimizer|rng)-\d+\.\w+")
"""Files of a checkpoint that nothing but a resume reads."""


def is_weights_only(folder: Path) -> bool:
    """Whether a checkpoint was reduced to its weights; one whose COMPLETE cannot be read was not."""
    sums = listed(folder, COMPLETE)
    return bool(sums) and not any(map(RESUME_ONLY.fullmatch, sums))


def reduce_to_weights(folder: Path) -> None:
    """Removes what only a resume reads from a complete checkpoint. One process calls it.

    The marker comes first: killed at any moment the checkpoint is complete with it or without it. Files that
    a kill has left are removed by the next call. A checkpoint of an earlier version, whose weights and
    optimizer are in one file, stays as it is.
    """
    sums = listed(folder, COMPLETE)
    if not is_weights_only(folder):
        if not any(name.startswith("state/optimizer-") for name in sums):
            return
        kept = {name: entry for name, entry in sums.items() if not RESUME_ONLY.fullmatch(name)}
        seal(folder, COMPLETE, kept)
    for path in (folder / "state").iterdir():
        if RESUME_ONLY.fullmatch(f"state/{path.name}"):
            path.unlink()
