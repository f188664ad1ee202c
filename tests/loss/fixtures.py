"""Reference cases (tests/fixtures/losses, and any other file of the same kind) played against the modes.

`errors(path)` plays one file, whatever its kind (the part of its name before the first `_`), and returns the
largest error of each quantity with its tolerance. `python -m tests.loss FILE ...` prints them. The kinds and
the meaning of their fields are in tests/fixtures/losses/README.md.
"""

from __future__ import annotations

import json
import math
import warnings
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from mft.batch import IGNORE, Batch
from mft.distributed.ddp import Ddp, Single
from mft.distributed.engine import Engine
from mft.loss.base import TaskLoss, task_sums
from mft.loss.coba import Coba
from mft.loss.famo import Famo
from mft.loss.means import SampleMean, TaskSampleMean, TaskTokenMean, TokenMean
from mft.loss.self_paced import SelfPaced
from mft.training.validate import Evaluator
from tests.distributed.ranks import run_ranks
from tests.loss.layout import Piece, packed, padded, pieces, step, token_losses

FIXTURES = Path(__file__).parent.parent / "fixtures" / "losses"
CASES = {"case1": TokenMean, "case2": SampleMean, "case3": TaskTokenMean, "case4": TaskSampleMean}


class Errors:
    """The largest error of each quantity, and the tolerance it is held to."""

    def __init__(self) -> None:
        self.largest: dict[str, tuple[float, float]] = {}

    def add(self, quantity: str, found: Any, expected: Any, tolerance: float, relative: bool = False) -> None:
        """Compares numbers or arrays; relative: to the largest expected value. A NaN is an infinite error."""
        found, expected = np.asarray(found, dtype=np.float64), np.asarray(expected, dtype=np.float64)
        assert found.shape == expected.shape, (quantity, found.shape, expected.shape)
        error = float(np.abs(found - expected).max()) / (
            float(np.abs(expected).max()) or 1.0 if relative else 1.0
        )
        error = math.inf if math.isnan(error) else error
        self.largest[quantity] = (max(error, self.largest.get(quantity, (0.0, 0.0))[0]), tolerance)

    def beyond(self) -> dict[str, tuple[float, float]]:
        """Returns the quantities whose error is above their tolerance."""
        return {name: pair for name, pair in self.largest.items() if not pair[0] <= pair[1]}


def started(loss: TaskLoss, tasks: int, weights: Iterable[float] | None = None) -> Any:
    """Returns the mode, started with tasks named t0, t1, ..."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".*has no task weights")
        loss.setup([f"t{i}" for i in range(tasks)], list(weights or [1.0] * tasks))
    return loss


def losses(values: Iterable[float | None]) -> torch.Tensor:
    """Returns per-task losses as `learn` takes them; None = absent."""
    return torch.tensor(
        [math.nan if value is None else float(value) for value in values], dtype=torch.float64
    )


def original_probe(row: Iterable[float]) -> torch.Tensor:
    """A probe of the original, where 0 stands for an absent task."""
    return losses([value or None for value in row])


# ── static_* ──


def static_case(path: Path, dtype: torch.dtype) -> tuple[dict, Any, torch.Tensor, torch.Tensor, list[Piece]]:
    """Returns the record, its arrays, logits with a graph, the nll of every position, and the samples."""
    record, arrays = json.loads(path.read_text()), np.load(path.with_suffix(".npz"))
    logits_BTV = torch.tensor(arrays["logits"], dtype=dtype).requires_grad_()
    labels_BT = torch.tensor(arrays["labels"], dtype=torch.int64)
    trained_BT = labels_BT != IGNORE
    if "loss_mask" in arrays:
        trained_BT &= torch.tensor(arrays["loss_mask"]) > 0
    nll_BT = -logits_BTV.log_softmax(-1).gather(-1, labels_BT.clamp(min=0)[..., None])[..., 0]
    samples = pieces(arrays["task_id"].reshape(len(labels_BT)).tolist(), trained_BT.tolist())
    return record, arrays, logits_BTV, nll_BT.flatten(), samples


def static(path: Path) -> Errors:
    """Losses and gradients of case1 to case4: rows at once, one by one, as the fixture splits them; padded,
    packed."""
    errors = Errors()
    for dtype, tolerance in ((torch.float64, 1e-10), (torch.float32, 1e-5)):
        record, arrays, logits_BTV, nll_all, samples = static_case(path, dtype)
        without = "original_head_on_batch_without_zero_token_rows" in record
        expected = record["original_head_on_batch_without_zero_token_rows" if without else "original_head"]
        partitions = [[[list(range(len(samples)))]], [[[i] for i in range(len(samples))]]]
        partitions += [record["partition"]] if "partition" in record else []
        kind = str(dtype).removeprefix("torch.")
        for case, mode in CASES.items():
            loss = started(mode(), record["K"], record["task_weights"])
            gradient = arrays[f"grad_dropped_{case}" if without else f"grad_{case}"]
            for partition in partitions:
                for arrange in (padded, packed):
                    ranks = [
                        [arrange([samples[i] for i in micro]) for micro in micros] for micros in partition
                    ]
                    value = step(loss, nll_all, ranks)
                    (grad,) = torch.autograd.grad(value, logits_BTV, retain_graph=True)
                    errors.add(f"loss {kind}", value.item(), expected[case]["loss"], tolerance, relative=True)
                    errors.add(f"gradient {kind}", grad.numpy(), gradient, tolerance, relative=True)
        if dtype == torch.float64:
            batch, where_BT = packed(samples)
            sum_K, count_K = task_sums(token_losses(nll_all, batch, where_BT), batch, record["K"])
            theirs = record["original_head"]["case1"][
                "task_loss"
            ]  # float32 in the original, 0 or NaN where absent
            for total, count, value in zip(sum_K.tolist(), count_K.tolist(), theirs, strict=True):
                if count:
                    errors.add("task_loss", total / count, value, 1e-6, relative=True)
                else:
                    assert value in (0.0, "nan"), f"{path}: task_loss of an absent task is {value}"
    return errors


# ── coba_*, selfpaced_*, famo_* ──


def coba(path: Path) -> Errors:
    """The weights of `variant=mftcoder` against the original's, and its intermediate values."""
    record, errors = json.loads(path.read_text()), Errors()
    hyper, tasks, rows = record["hyper"], record["K"], record["val_loss_ratio"]
    interval = hyper["coba_update_interval"]
    windows = (hyper["coba_warmup_steps"], hyper["coba_history_length"])
    loss = started(Coba("mftcoder", *windows, tau=hyper["coba_tau"], update_interval=interval), tasks)
    expected = {entry["step"]: entry for entry in record["steps"]}
    loss.learn(1, valid_K=torch.ones(tasks))  # the rows are ratios already: the first losses are their unit
    for update in range(1, len(rows)):
        if loss.wants_probe(update + 1):
            logged = loss.learn(update + 1, valid_K=original_probe(rows[update]))
            # the original computes its weights one interval later, from the same probes
            if (entry := expected.pop(update + interval, None)) is not None:
                errors.add("weights", loss.weight_K, entry["weights"], 1e-6)
                errors.add(
                    "slopes", [logged[f"coba/slope/t{i}"] for i in range(tasks)], entry["slopes"], 1e-12
                )
                replica = entry.get("replica", {})
                for name in ("rcs", "acs"):
                    if name in replica:
                        found = [logged[f"coba/{name}/t{i}"] for i in range(tasks)]
                        errors.add(name, found, replica[name], 1e-6)
                if "df" in replica:
                    errors.add("df", logged["coba/df"], replica["df"], 1e-9, relative=True)
    assert not expected, f"{path}: steps {list(expected)} were not reached"
    return errors


def selfpaced(path: Path) -> Errors:
    """The weights of `self_paced` against the original's float32 and its float64 restatement."""
    record, errors = json.loads(path.read_text()), Errors()
    hyper, tasks = record["hyper"], record["K"]
    interval, length = hyper["selfpaced_interval"], hyper["selfpaced_history_length"]
    loss = started(SelfPaced(hyper["selfpaced_scale_factor"], length, length, interval), tasks)
    expected = {entry["step"]: entry for entry in record["steps"]}
    for update, row in enumerate(record["val_loss"]):
        if loss.wants_probe(update + 1):
            row = np.array(row, dtype=np.float32).tolist()  # what the original was fed
            logged = loss.learn(update + 1, valid_K=original_probe(row))
            if (entry := expected.pop(update + interval, None)) is not None:
                errors.add("weights float32", loss.weight_K, entry["weights"], 1e-4)
                if "replica64" in entry:
                    replica = entry["replica64"]
                    slopes = [
                        logged[f"self_paced/slope/t{i}"] * interval for i in range(tasks)
                    ]  # theirs: per probe
                    errors.add("weights float64", loss.weight_K, replica["weights"], 1e-8)
                    errors.add("slopes", slopes, replica["slopes"], 1e-8)
    assert not expected, f"{path}: steps {list(expected)} were not reached"
    return errors


def famo(path: Path) -> Errors:
    """Objective, coefficients and logits of `famo` against the authors' float32."""
    record, errors = json.loads(path.read_text()), Errors()
    tasks, hyper, rows = record["K"], record["hyper"], record["task_losses"]
    floors = hyper.get("min_losses", [0.0] * tasks)
    loss = Famo(lr=hyper["w_lr"], weight_decay=hyper["gamma"])
    loss.min_loss_by_task = {f"t{i}": floor for i, floor in enumerate(floors)}
    loss, samples = started(loss, tasks), pieces(range(tasks), [[True]] * tasks)
    for number, entry in enumerate(record["steps"], start=1):
        nll_all = torch.tensor(rows[number - 1], dtype=torch.float64, requires_grad=True)
        value = step(loss, nll_all, [[padded(samples)]])
        (grad,) = torch.autograd.grad(value, nll_all)
        errors.add("weighted_loss", value.item(), entry["weighted_loss"], 2e-6)
        errors.add("d_loss_d_task_loss", grad.numpy(), entry["d_loss_d_task_loss"], 2e-6)
        logged = loss.learn(number, train_K=nll_all.detach())
        errors.add("z", [logged[f"famo/z/t{i}"] for i in range(tasks)], entry["z"], 2e-6)
        loss.learn(number, repeat_K=losses(rows[number]))
        errors.add("logits_after", loss.xi_K, entry["logits_after"], 5e-6)
    return errors


# ── evaluate_* ──


class Recorded(torch.nn.Module):
    """Stands for a model: hands out the token losses of recorded logits; ids_BT holds the number of the
    batch."""

    def __init__(self, nll_NBT: torch.Tensor):
        super().__init__()
        self.nll_NBT = nll_NBT

    def forward(self, batch):
        return self.nll_NBT[int(batch.ids_BT[0, 0])], torch.zeros(())


def recorded(path: Path, rank: int) -> tuple[dict, Recorded, list[Batch]]:
    """Returns the record, the model and the batches of one rank."""
    record, arrays = json.loads(path.read_text()), np.load(path.with_suffix(".npz"))
    logits, labels = (
        torch.tensor(arrays["logits"][rank]).double(),
        torch.tensor(arrays["labels"][rank]).long(),
    )
    trained = torch.tensor(arrays["loss_mask"][rank]) > 0
    nll = -logits.log_softmax(-1).gather(-1, labels.clamp(min=0)[..., None])[..., 0] * trained
    batches = []
    for number, task_B in enumerate(torch.tensor(arrays["task_id"][rank]).long()):
        rows, length = labels[number].shape
        target_BT = torch.where(trained[number], labels[number], IGNORE)
        across = torch.arange(length).expand(rows, length)
        down = torch.arange(rows)[:, None].expand(rows, length)
        ids_BT = torch.full((rows, length), number)
        batches.append(Batch(ids_BT, target_BT, task_B.reshape(rows, 1).expand(rows, length), down, across))
    return record, Recorded(nll), batches


def evaluated(path: Path, engine: Engine) -> list[list[float]]:
    """Returns the task means of every probe of the fixture, as this rank sees them."""
    record, module, batches = recorded(path, engine.rank)
    names = [f"t{k}" for k in range(record["K"])]
    return [
        Evaluator(engine, names, lambda: [batches[i] for i in used]).losses(module).tolist()  # noqa: B023
        for used in record["batches_used_per_step"]
    ]


def evaluated_in_group(path: Path) -> list[list[float]]:
    engine = Ddp().start("fp32", cpu=True)
    try:
        return evaluated(path, engine)
    finally:
        engine.close()


def evaluate(path: Path) -> Errors:
    """The task means of validation against the token-weighted ones, on as many ranks as the fixture has."""
    record, errors = json.loads(path.read_text()), Errors()
    ranks = len(np.load(path.with_suffix(".npz"))["logits"])
    if ranks == 1:
        engine = Single().start("fp32", cpu=True)
        results = [evaluated(path, engine)]
        engine.close()
    else:
        results = run_ranks(ranks, evaluated_in_group, path)
    first = record["valid_task_loss_begining"]
    for found in results:
        expected = zip(
            record["token_weighted_global_mean"], record["token_weighted_global_ratio"], strict=True
        )
        for row, (means, ratios) in zip(found, expected, strict=True):
            for value, mean, ratio, start in zip(row, means, ratios, first, strict=True):
                if mean is None:
                    assert math.isnan(value), f"{path}: an absent task has a loss of {value}"
                else:
                    errors.add("mean", value, mean, 1e-6, relative=True)
                    errors.add("ratio", value / start, ratio, 1e-6, relative=True)
    return errors


KINDS: dict[str, Callable[[Path], Errors]] = {
    "static": static,
    "coba": coba,
    "selfpaced": selfpaced,
    "famo": famo,
    "evaluate": evaluate,
}


def errors(path: Path) -> Errors:
    """Plays one fixture file (its .json; arrays lie beside it as .npz); the kind is the first word of its
    name."""
    kind = path.name.split("_")[0]
    if kind not in KINDS:
        raise SystemExit(f"{path}: unknown kind {kind!r}; known are {', '.join(KINDS)}")
    return KINDS[kind](path)
