"""The test split: evaluated once, when a run has finished, with the weights of its best checkpoint."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from mft.training.resume import trouble_of_all
from mft.training.trainer import Trainer


@dataclass(frozen=True)
class Tested:
    """What the test found. Nothing is chosen by it."""

    losses: dict[str, float] = field(default_factory=dict)
    """Nats per token by task; {}: there was no test."""
    step: int | None = None
    """Of the checkpoint that was tested."""


def evaluate(t: Trainer, run_dir: Path) -> Tested:
    """Evaluates all rows of the test split; all ranks call it, when final/ is written and nothing trains
    afterwards.

    The weights are those of the best validated checkpoint, which are loaded into the engine unless they are
    the last ones; those of a run without validation are its last ones.
    """
    if t.test is None:
        return Tested()
    step = t.state.best.saved_step or t.state.step
    if step != t.state.step:
        folder = run_dir / "checkpoints" / f"step-{step}"
        if problem := trouble_of_all(folder, t.engine):
            t.progress.show(
                f"the test split is not evaluated: {folder.name}, the best, is damaged: {problem}"
            )
            return Tested()
        t.engine.load_weights(folder / "state")
    return Tested(t.evaluate(t.test, "test", step), step)
