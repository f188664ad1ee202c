"""What a run takes of its tasks: tokens and steps, from the token cache, or about, from a few rows.

Shapes: K tasks, N samples.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from mft.config.schema import settings_of
from mft.data import hub
from mft.data.cache.fingerprint import are_remembered
from mft.data.cache.store import is_prepared
from mft.data.datasets import dataset
from mft.data.loader import BatchLoader
from mft.data.mixture import Streams, counts_per_epoch
from mft.data.readers import Rows, row_text
from mft.data.row_fields import RowError
from mft.data.template_choice import adopt, named
from mft.data.tokenize import Encoder, fit_to_length
from mft.errors import UserError
from mft.plan.case import Case

if TYPE_CHECKING:
    from mft.data.datasets import Dataset
    from mft.data.settings import DataSettings
    from mft.data.task import Task

QUICK = 4 * 2**20
"""Bytes of all tasks that are tokenised to count them, within a second or two; the cache keeps the tokens."""

SAMPLED_FILES, SAMPLED_ROWS = 4, 64
"""Of a larger task, files and rows of each of them by which it is estimated."""

COMPRESSED = 5.0
"""Bytes that one of a compressed file stands for."""

CHARACTERS = 4.0
"""Of a token, where no tokenizer is here."""

FILL = 0.99
"""Share of a packed row that holds tokens."""


@dataclass(frozen=True)
class TaskPlan:
    """What a run takes of a task."""

    name: str
    samples: float
    """That there are to train on."""
    tokens: float
    """Of the whole run, all of them."""
    trained: float
    """Those that carry loss."""
    epochs: float
    """How often each sample comes."""
    steps: float
    """Its part of the run's steps, by tokens."""


@dataclass(frozen=True)
class DataPlan:
    """What a run takes of its data."""

    tasks: list[TaskPlan]
    steps: int
    about: bool
    """Whether it was estimated from a few rows, or counted."""
    source: str
    """Of the numbers, in words."""
    lengths_N: np.ndarray
    """Tokens of samples: all of them, or those it was estimated by."""

    @property
    def tokens(self) -> float:
        """Of all tasks."""
        return sum(task.tokens for task in self.tasks)

    @property
    def trained(self) -> float:
        """Of all tasks, those that carry loss."""
        return sum(task.trained for task in self.tasks)

    def longer(self, than: int) -> float:
        """Returns the part of the samples, of 1, that have more tokens."""
        return float((self.lengths_N > than).mean()) if len(self.lengths_N) else 0.0


def data_plan(of: Case) -> DataPlan | None:
    """Returns what a case takes of its tasks, None where it has none. Raises UserError as reading them does."""
    if not of.parts.tasks:
        return None
    files = [file for task in of.parts.tasks for file in task.files()]
    here = [file for file in files if not hub.is_name(file)]
    plain = not any(compressed(file) for file in here) and len(here) == len(files)
    quick = plain and sum(file.stat().st_size for file in here) <= QUICK
    try:
        tokenizer = of.parts.model.tokenizer()
    except UserError:  # a folder with nothing but a config.json
        return _estimated(of, None)
    _, settings = settings_of(of.cfg)
    encoder, cache = _encoder(settings, tokenizer), of.cfg.cache_dir
    # of files that this cache has never seen, not even a hash is made
    there = are_remembered(here, Path(cache)) and all(
        is_prepared(task, encoder, settings, cache) for task in of.parts.tasks
    )
    if not there and not quick:
        return _estimated(of, encoder)
    return _counted(
        of, dataset(of.parts.named_tasks, settings, tokenizer, cache, of.parts.rows.splits_samples)
    )


def _encoder(settings: DataSettings, tokenizer: Any) -> Encoder:
    template = named(settings.template, settings.role_markers, tokenizer)
    adopt(tokenizer, template)
    return Encoder(tokenizer, template)


def _counted(of: Case, data: Dataset) -> DataPlan:
    train, settings = settings_of(of.cfg)
    shares = [task.share for task in data.tasks]
    loader = BatchLoader(data.stores, of.parts.rows, of.sizes, 0, 0, train, settings, shares)
    steps, mixed = loader.total_steps(), loader.mixture(data.names)
    samples = loader.train_samples
    size_K, trained_K = samples.totals()
    tokens_K = np.bincount(samples.task_N, samples.lengths_N, minlength=len(size_K))
    epochs_K = np.array([mixed[name]["epochs"] for name in data.names])
    tasks = _tasks(data.names, size_K, tokens_K, trained_K, epochs_K, steps)
    return DataPlan(tasks, steps, False, "counted", samples.lengths_N)


@dataclass(frozen=True)
class Totals:
    """What a mixture asks of samples."""

    size_K: np.ndarray
    trained_K: np.ndarray

    def totals(self) -> tuple[np.ndarray, np.ndarray]:
        """Returns the samples and the trained tokens of each task."""
        return self.size_K, self.trained_K


def _estimated(of: Case, encoder: Encoder | None) -> DataPlan:
    """encoder: None where no tokenizer is here: tokens are then characters divided by CHARACTERS."""
    train, settings = settings_of(of.cfg)
    found = [_sampled(task, encoder, settings) for task in of.parts.tasks]
    size_K, tokens_K, trained_K = (np.array([of_task[i] for of_task in found]) for i in range(3))
    lengths_N = np.concatenate([of_task[3] for of_task in found])
    shares = [task.share for task in of.parts.tasks]
    totals: Any = Totals(np.maximum(size_K, 1), trained_K)
    taken_K = Streams(totals.size_K, counts_per_epoch(totals, shares, settings), 0).count_K
    epoch_K = taken_K / np.maximum(size_K, 1)
    by_tokens = of.parts.rows.packs_samples or of.parts.rows.splits_samples
    in_epoch = float((epoch_K * tokens_K).sum())
    rows = in_epoch / (settings.seq_length * FILL) if by_tokens else float(taken_K.sum())
    of_epoch = max(1, math.ceil(rows / of.sizes.total))
    steps = int(min(math.ceil(train.epochs * of_epoch), train.max_steps or math.inf))
    epochs_K = epoch_K * steps / of_epoch
    source = "estimated from the first rows" if encoder else f"estimated, {CHARACTERS:g} characters a token"
    names = [task.name for task in of.parts.tasks]
    return DataPlan(
        _tasks(names, size_K, tokens_K, trained_K, epochs_K, steps), steps, True, source, lengths_N
    )


def _tasks(
    names: list[str],
    size_K: np.ndarray,
    tokens_K: np.ndarray,
    trained_K: np.ndarray,
    epochs_K: np.ndarray,
    steps: int,
) -> list[TaskPlan]:
    """tokens_K, trained_K: of one pass over each task; epochs_K: passes of the run."""
    all_tokens = max(1.0, float((tokens_K * epochs_K).sum()))
    return [
        TaskPlan(name, size, tokens * epochs, trained * epochs, epochs, steps * tokens * epochs / all_tokens)
        for name, size, tokens, trained, epochs in zip(
            names, size_K.tolist(), tokens_K.tolist(), trained_K.tolist(), epochs_K.tolist(), strict=True
        )
    ]


def _sampled(
    task: Task, encoder: Encoder | None, settings: DataSettings
) -> tuple[float, float, float, np.ndarray]:
    """Returns samples, tokens and trained tokens of a task's training part, and lengths of samples."""
    _, row_format = task.find_format()
    files = [file for file, split in zip(task.files(), task.splits(), strict=True) if not split]
    lengths, trained, size, rows = [], 0, 0, 0
    for file in files[:SAMPLED_FILES]:
        for _, _, row in islice(Rows([file]), SAMPLED_ROWS):
            size, rows = size + len(row_text(row).encode("utf-8", "replace")) + 1, rows + 1
            if isinstance(row, RowError):
                continue
            try:
                messages = row_format.messages(row)
                fitted = (
                    fit_to_length(messages, encoder.encode(messages), encoder, settings) if encoder else None
                )
            except RowError:
                continue
            if fitted is None:
                counts = [math.ceil(len(message.content) / CHARACTERS) for message in messages]
                lengths.append(sum(counts))
                carry = [m.train and m.role in ("assistant", "text") for m in messages]
                trained += sum(count for count, learned in zip(counts, carry, strict=True) if learned)
                continue
            lengths += [len(ids_S) for ids_S, _ in fitted.parts]
            trained += sum(int(trained_S[1:].sum()) for _, trained_S in fitted.parts)
    proportions = task.proportions(settings.split)
    whole = sum(_bytes(file) for file in files)
    times = max(1.0, whole / max(1, size)) * proportions[0] / sum(proportions)
    if any(hub.is_name(file) for file in files) and not whole:
        times = proportions[0] / sum(proportions)
    samples = len(lengths) * times
    if settings.limit and samples > settings.limit:
        samples, times = float(settings.limit), settings.limit / max(1, len(lengths))
    return samples, sum(lengths) * times, trained * times, np.array(lengths)


def compressed(file: Path) -> bool:
    """Whether a file holds more text than it has bytes."""
    return file.name.lower().endswith((".gz", ".zst", ".parquet"))


def _bytes(file: Path) -> float:
    """Returns about how many bytes of JSON a file holds, 0 for a data set of the hub."""
    if hub.is_name(file):
        return 0.0
    return file.stat().st_size * (COMPRESSED if compressed(file) else 1.0)
