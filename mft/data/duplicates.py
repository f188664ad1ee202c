"""Exact duplicates: rows repeated inside a task, and rows that are both trained on and held out.

Shapes: N samples and R rows of a store (a row of split_turns has several samples), U digests held out.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from mft.data.cache.store import Store
from mft.data.settings import Duplicates
from mft.data.split import SPLITS

REPEATED, HELD_OUT = "repeated", "held out"
"""Reasons. repeated: an earlier row of the same task and split says the same; held out: a training row that
is in the validation or test part of any task, too."""

TRAIN = SPLITS.index("train")


def mark_duplicates(stores: Sequence[Store], duplicates: Duplicates) -> None:
    """Counts the duplicates of each store in its report, and leaves them out of it under `drop`.

    report["duplicates"]: rows by reason, each row once. Rows are the same where roles and contents are; what
    one task trains on and another one trains on as well is no duplicate. Memory: about 40 bytes a sample of
    the largest task.
    """
    # Over all tasks: a training row of one that validates another would flatter that validation.
    held_out = [np.unique(store.digest_N[store.split_N != TRAIN]) for store in stores]
    held_out_U = np.unique(np.concatenate([*held_out, np.empty(0, np.uint64)]))
    for store in stores:
        leaked_N = (store.split_N == TRAIN) & np.isin(store.digest_N, held_out_U)
        repeated_N, same_N = _repeated(store)
        repeated_N &= ~leaked_N
        begins_N = store.begins_N()
        store.report["duplicates"] = {
            REPEATED: int((repeated_N & begins_N).sum()),
            HELD_OUT: int((leaked_N & begins_N).sum()),
        }
        if duplicates == Duplicates.drop:
            # the first call renumbers the samples, so the second takes its mask in the new numbers
            store.leave_out(repeated_N, REPEATED, same_N)
            store.leave_out(leaked_N[~repeated_N], HELD_OUT)


def _repeated(store: Store) -> tuple[np.ndarray, np.ndarray]:
    """Returns bool [N], whether a sample's row repeats an earlier one, and int [N], its first sample."""
    begins_N = store.begins_N()
    row_N = np.cumsum(begins_N) - 1
    first_R = np.flatnonzero(begins_N)
    # Sorted by digest and split, equal rows are neighbours; no dictionary of Python objects is needed.
    digest_R, split_R = store.digest_N[first_R], store.split_N[first_R]
    order_R = np.lexsort((split_R, digest_R))  # stable: equal rows stay in their order
    new_R = np.ones(len(order_R), bool)
    new_R[1:] = (np.diff(digest_R[order_R]) != 0) | (np.diff(split_R[order_R]) != 0)
    repeated_R, same_R = np.empty(len(order_R), bool), np.empty(len(order_R), np.int64)
    repeated_R[order_R] = ~new_R
    same_R[order_R] = order_R[new_R][np.cumsum(new_R) - 1]
    return repeated_R[row_N], first_R[same_R][row_N]
