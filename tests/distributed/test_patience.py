"""No rank waits in a collective for the lone work of another one; the timeout of collectives is what it is said
to be."""

from __future__ import annotations

import importlib
import json
import threading
import time
from collections.abc import Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.distributed import distributed_c10d

from mft.distributed import heartbeat
from tests.distributed.ranks import run_ranks
from tests.distributed.runs import Tree, play
from tests.distributed.test_engine import prepared
from tests.distributed.test_engines import Layered, backend

pytestmark = [pytest.mark.slow, pytest.mark.dist]

SECONDS = 3.0
"""Timeout of collectives, in these tests; lone work takes `2 * SECONDS`."""

LONE = (
    "mft.data.datasets:Dataset.write_report",
    "mft.assembly.loader:write_json",
    "mft.model.causal_lm:CausalLM.model",
    "mft.training.sample_answers:Answers.ask",
    "mft.training.resume:marked_steps",
    "mft.training.provenance:recorded",
    "mft.tracking.base:Jsonl.open",
    "mft.tracking.base:Jsonl.log",
    "mft.training.sample_losses:_parquet",
    "mft.training.sample_losses:SampleLosses.prune",
    "mft.model.export:save_final",
    "mft.distributed.sharded_state:save",
    "mft.distributed.rng:save",
    "mft.training.checkpoint:measure",
    "mft.training.checkpoint:seal",
    "mft.training.checkpoint:Checkpoints._prune",
    "mft.training.summary:write",
    "mft.tracking.base:FanOut.artifact",
    "mft.tracking.base:FanOut.model",
    "mft.tracking.base:FanOut.close",
)
"""What rank 0 does alone, or longer than others, in a run: at its first call it takes long."""

RESUMING = ("mft.training.resume:trouble", "mft.distributed.sharded_state:load", "mft.distributed.rng:load")
"""The same when a run is resumed."""

SHARDING = {
    "ddp": (),
    "fsdp": ("mft.distributed.fsdp:FsdpEngine._of_rank_0", "mft.distributed.fsdp:FsdpEngine._whole"),
    "zero3": ("mft.distributed.deepspeed_engine:DeepSpeedEngine._whole",),
}
"""The same among the collectives by which a model is divided, or gathered to be saved."""


def slow(place: str, done: list[str]) -> None:
    """Makes the first call of a function take longer than a collective may."""
    module, _, path = place.partition(":")
    owner: Any = importlib.import_module(module)
    *classes, name = path.split(".")
    for part in classes:
        owner = getattr(owner, part)
    function = getattr(owner, name)

    def slowed(*arguments: Any, **named: Any) -> Any:
        if place not in done:
            done.append(place)
            time.sleep(2 * SECONDS)
        return function(*arguments, **named)

    setattr(owner, name, slowed)


def slowed_run(run_dir: Path, places: Sequence[str]) -> list[str]:
    """Plays a run; returns which places were slow in this rank: in rank 0 alone."""
    done: list[str] = []
    for place in places if torch.distributed.get_rank() == 0 else ():
        slow(place, done)
    play([run_dir])
    return done


@pytest.mark.long
@pytest.mark.parametrize("kind", ["ddp", "fsdp", "zero3"])
def test_a_run_outlives_every_slow_place(kind: str, tmp_path: Path) -> None:
    tree = Tree(tmp_path)
    prompts = tmp_path / "prompts.jsonl"
    turns = [{"role": "human", "content": "add"}, {"role": "bot", "content": "value"}]
    prompts.write_text(json.dumps({"chat_rounds": turns}) + "\n")
    short = [
        f"dist.timeout_minutes={SECONDS / 60}",
        "train.max_steps=4",
        "train.eval_every=2",
        "train.save_every=2",
        "train.log_every=2",
        f"train.prompts={prompts}",
        "train.prompts_max_new_tokens=2",
        "data.split=[80,10,10]",
    ]
    run_dir = tree.frozen(kind, "slow", short)
    places = [*LONE, *SHARDING[kind]]
    done = run_ranks(2, slowed_run, run_dir, places)
    assert sorted(done[0]) == sorted(places) and not done[1]
    resumed = tree.frozen(kind, "resumed", short, start=tree.step(kind, "slow", 2))
    done = run_ranks(2, slowed_run, resumed, RESUMING)
    assert sorted(done[0]) == sorted(RESUMING)


def timeouts(kind: str) -> dict[str, Any]:
    """Returns the timeouts, in minutes, of all process groups of a started engine, in and after `patient`."""

    def minutes() -> set[float]:
        groups = distributed_c10d._world.pg_map
        options = [group._get_backend(torch.device("cpu")).options for group in groups]
        return {option._timeout / timedelta(minutes=1) for option in options}

    started = backend(kind)
    started.timeout_minutes = 7.5
    engine = started.start("fp32", cpu=True)
    prepared(engine, kind=Layered)
    torch.distributed.new_group()
    found: dict[str, Any] = {"groups": len(distributed_c10d._world.pg_map), "usual": minutes()}
    with engine.patient():
        with engine.patient():
            torch.distributed.new_group()
        found["patient"] = minutes()
    found["after"] = minutes()
    engine.close()
    return found


@pytest.fixture(scope="module")
def found() -> dict[str, list[dict[str, Any]]]:
    kinds = ("ddp", "zero2", "zero3", "fsdp")
    results = run_ranks(2, of_all, kinds)
    return {kind: [result[kind] for result in results] for kind in kinds}


def of_all(kinds: Sequence[str]) -> dict[str, Any]:
    return {kind: timeouts(kind) for kind in kinds}


@pytest.mark.parametrize("kind", ["ddp", "zero2", "zero3", "fsdp"])
def test_every_process_group_has_the_timeout(kind: str, found: dict[str, list[dict[str, Any]]]) -> None:
    for rank in found[kind]:
        assert rank["groups"] > 1
        assert rank["usual"] == rank["after"] == {7.5}
        assert rank["patient"] == {heartbeat.LONGEST_HOURS * 60}


def seconds_of_a_barrier() -> float:
    engine = backend("ddp").start("fp32", cpu=True)
    engine.barrier()
    began = time.perf_counter()
    for _ in range(50):
        engine.barrier()
    seconds = (time.perf_counter() - began) / 50
    engine.close()
    return seconds


def test_a_barrier_is_quick() -> None:
    assert max(run_ranks(2, seconds_of_a_barrier)) < 0.1


def test_the_store_does_not_grow_with_the_rounds() -> None:
    server = torch.distributed.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    clients = [torch.distributed.TCPStore("127.0.0.1", server.port) for _ in range(2)]
    beats = [heartbeat.Heartbeat(client, rank, 2, minutes=1) for rank, client in enumerate(clients)]
    other = threading.Thread(target=lambda: [beats[1].wait_for_all() for _ in range(20)])
    other.start()
    for _ in range(20):
        beats[0].wait_for_all()
    other.join(60)
    assert not other.is_alive()
    assert not any(server.check([f"{key}/{n}"]) for n in range(1, 20) for key in ("arrived", "all"))
    other = threading.Thread(target=beats[1].leave)
    other.start()
    beats[0].leave()
    other.join(60)
    assert not other.is_alive()
