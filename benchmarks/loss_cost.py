"""What the adaptive loss modes cost over task_token_mean, on the demo's model, tasks and batch.

    mft demo && python -m benchmarks.loss_cost [rounds] [mode ...]

One process, one compute thread, fp32. In every round each mode takes the steps from one probe to the next
(its
`update_interval`, 5 for coba; one step for modes without probes) on the same micro-batches of the same model,
through the training loop itself, and so does the control right before it: load and cache are shared. CPU time
is compared round by round and the median of the ratios is printed.
"""

from __future__ import annotations

import statistics
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

CONTROL = "task_token_mean"


def assembled(folder: Path):  # type: ignore[no-untyped-def]
    """Returns what the steps share: engine, module, optimizer, feed, names, the settings of the demo."""
    from omegaconf import OmegaConf

    from mft.config.build import build
    from mft.config.compose import compose_resolved
    from mft.config.schema import batch_sizes, typed
    from mft.data.cache.store import prepare
    from mft.data.loader import BatchLoader
    from mft.data.task import all_tasks
    from mft.data.template_choice import named
    from mft.data.tokenize import Encoder
    from mft.model.token_loss import TokenLoss

    cfg = typed(compose_resolved(["experiment=demo", f"output_dir={folder}", "train.precision=fp32"]))
    train, data = OmegaConf.to_object(cfg.train), OmegaConf.to_object(cfg.data)
    family, peft, optim = (build(cfg[name], name) for name in ("model", "peft", "optimizer"))
    tokenizer = family.tokenizer()
    tasks = all_tasks({name: build(cfg.task[name], f"task.{name}") for name in cfg.task}, [])
    encoder = Encoder(tokenizer, named(data.template, data.role_markers))
    stores = [prepare(task, encoder, data, cfg.cache_dir) for task in tasks]
    engine = build(cfg.dist).start("fp32")
    sizes = batch_sizes(train, engine.world)
    shares = [task.share for task in tasks]
    feed = BatchLoader(
        stores, build(cfg.data.rows), sizes, engine.rank, tokenizer.pad_token_id, train, data, shares
    )
    module = TokenLoss(peft.attach(family.model(peft.dtype("fp32"), None), family), family)
    module, optimizer = engine.prepare(
        module, optim.build(module.named_parameters(), optim.base_lr(peft.default_lr))
    )
    return engine, module, optimizer, feed, [task.name for task in tasks], train


class NoValidation:
    """Steps alone are timed."""

    def by_name(self, module: Any, samples: Any = None) -> dict[str, float]:
        return {}


def main(rounds: int, modes: list[str]) -> None:
    """Prints the ratio of each mode's CPU time to the control's, over the steps from one probe to the
    next."""
    import torch

    from mft.config.build import build
    from mft.config.compose import compose_resolved
    from mft.tracking.base import Tracker
    from mft.training.loop import fit
    from mft.training.metrics import Meter
    from mft.training.progress import Terminal
    from mft.training.state import State
    from mft.training.trainer import Trainer
    from mft.training.validate import Evaluator

    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        engine, module, optimizer, feed, names, settings = assembled(Path(folder))
    settings.eval_at_start = False

    def training(mode: str) -> Trainer:
        loss = build(compose_resolved([f"loss={mode}"]).loss, "loss")
        loss.setup(names, [1.0] * len(names))
        return Trainer(
            engine=engine,
            module=module,
            optimizer=optimizer,
            loss=loss,
            names=names,
            weights=[1.0] * len(names),
            loader=feed,
            learning_rate=lambda step: 1e-5,
            evaluator=NoValidation(),
            probe=lambda step: Evaluator(engine, names, lambda: feed.probe(step, loss.probe_samples)).losses(
                module
            ),
            save=lambda state: Path(),
            meter=Meter(names, engine.device),
            tracker=Tracker(),
            progress=Terminal((), quiet=True),
            settings=settings,
            total_steps=0,
            stop_requested=lambda: False,
            origin=str,
        )

    def steps(t: Trainer, start: State, count: int) -> float:
        """Takes `count` steps from there; returns their CPU seconds."""
        t.state = replace(start)
        t.total_steps = start.step + count
        started = time.process_time()
        fit(t)
        return time.process_time() - started

    control, trainings = training(CONTROL), {mode: training(mode) for mode in modes}
    interval = {mode: getattr(t.loss, "update_interval", 1) for mode, t in trainings.items()}
    places = {mode: State() for mode in modes}
    ratios: dict[str, list[float]] = {mode: [] for mode in modes}
    steps(control, State(), 1)  # warms up allocator and caches
    for number in range(1, rounds + 1):
        for mode, t in trainings.items():
            base = steps(control, places[mode], interval[mode])
            own = steps(t, places[mode], interval[mode])
            places[mode] = t.state
            ratios[mode].append(own / base)
            print(
                f"round {number}: {mode} {own:.1f} s, {CONTROL} {base:.1f} s, {own / base:.3f} x", flush=True
            )
    for mode in modes:
        line = f"{mode}: {statistics.median(ratios[mode]):.3f} x the CPU time of {CONTROL}"
        if trainings[mode].loss.wants_probe(1):
            samples, every = trainings[mode].loss.probe_samples, interval[mode]
            line += f", with a probe of {samples} samples a task every {every} step{'s' if every > 1 else ''}"
        print(line)


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 3, sys.argv[2:] or ["coba"])
