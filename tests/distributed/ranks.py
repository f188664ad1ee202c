"""Runs a function in several ranks on this machine, over gloo: `run_ranks(2, function, ...)`.

A start costs seconds the first time in a test session (the fork server imports torch) and about one
afterwards, a tiny step milliseconds. So start once (a module-scoped fixture), run many cases inside, and
return plain values to assert on.
"""

from __future__ import annotations

import pickle
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from mft.launch.spawn import spawn


def run_ranks(
    world: int, function: Callable[..., Any], *arguments: Any, shutdown_seconds: int = 10
) -> list[Any]:
    """Returns what function(*arguments) returned in each rank, by rank.

    function: at the top level of an importable module (tests.distributed.test_engine, not a closure);
    arguments and result must pickle, tensors are copied. A gloo process group is up around the call and stays
    up, so that any number of engines may be started and closed one after another. A rank that raises makes
    this raise WorkerError with its traceback.
    """
    with tempfile.TemporaryDirectory() as folder:
        results = spawn(_call, (function, arguments), world, Path(folder), shutdown_seconds)
    return [pickle.loads(results[rank]) for rank in range(world)]


def _call(function: Callable[..., Any], arguments: tuple[Any, ...]) -> bytes:
    import torch

    torch.distributed.init_process_group("gloo")
    try:
        return pickle.dumps(function(*arguments))
    finally:
        torch.distributed.destroy_process_group()
