"""Inspect the data of a run, or prepare it ahead of time.

The overrides are those of `mft train`; nothing is trained, and no model is loaded.

  report       what becomes of the rows of every task, and a picture of the lengths
  show         samples as the model will see them, with what is trained marked
  prepare      tokenise now, so that a run (on a cluster) starts at once

  task=NAME     (show) this task only; the name of a folder in data.paths works, too
  output_dir=…  (report) where data.json, mixture.json, dropped.jsonl and lengths.png go: its report/;
                without it outputs/<name>/data

examples:
  mft data report experiment=demo
  mft data show experiment=demo task=docstring --n 3
  mft data prepare experiment=demo
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, cast

from mft.commands.arguments import COUNT, Parser, action_of, overrides_in
from mft.console.screen import console
from mft.errors import UserError, nearest
from mft.files.json_file import write_json

if TYPE_CHECKING:
    from omegaconf import DictConfig
    from rich.console import Console

    from mft.data.datasets import Dataset
    from mft.data.packing import RowBuilder
    from mft.data.settings import DataSettings
    from mft.training.settings import TrainSettings

DEFAULT_SAMPLES = 3
"""Samples of each task that `mft data show` prints."""


def parser() -> Parser:
    """Returns the command line of `mft data`."""
    words = "report|show|prepare [KEY=VALUE …] [--n N] [--config-dir DIR]"
    line = Parser("data", words, __doc__, overrides=True, actions=("report", "show", "prepare"))
    line.option("--n", COUNT, f"(show) samples of each task (default: {DEFAULT_SAMPLES})", formerly=True)
    line.composing()
    return line


def command(arguments: Sequence[str]) -> None:
    """Composes the config, prepares its data, and does one of the three."""
    line = parser()
    parsed = line.parse(arguments or ["--help"])
    action, words = action_of(line, parsed.words)
    if parsed.n and action != "show":
        raise UserError(f"mft data {action} has no flag --n; mft data show has.")
    overrides, config_dirs = overrides_in(words), parsed.config_dir or []
    if action == "show":
        overrides, only = without_task_name(overrides, config_dirs)
        show(prepared(overrides, config_dirs), parsed.n or DEFAULT_SAMPLES, only)
        return
    data = prepared(overrides, config_dirs)
    from mft.data.report import tables

    for table in tables(data.dataset.stores, data.dataset.names):
        data.terminal.print(table)
    if action == "prepare":
        for name, store in zip(data.dataset.names, data.dataset.stores, strict=True):
            folder = Path(data.cfg.cache_dir) / "tokens" / store.fingerprint
            data.terminal.print(f"{name}: {len(store):,} samples in {folder}", soft_wrap=True, markup=False)
    else:
        report(data, overrides)


@dataclass(frozen=True)
class PreparedData:
    """A checked config and its tokenised data."""

    cfg: DictConfig
    """The composed config."""

    settings: DataSettings
    """`cfg.data` as an object."""

    world: int
    """Ranks of the run."""

    dataset: Dataset
    """Tasks, tokenizer and token stores."""

    rows: RowBuilder
    """How samples become rows."""

    terminal: Console
    """Where the answer is printed."""


def prepared(overrides: Sequence[str], config_dirs: Sequence[Path]) -> PreparedData:
    """Returns the data that overrides compose; raises UserError as `mft train` would."""
    from omegaconf import OmegaConf

    from mft.config.compose import compose_resolved
    from mft.config.overrides import with_output_dir
    from mft.config.validate import check
    from mft.launch.placement import ranks

    cfg = compose_resolved(with_output_dir(overrides), config_dirs)
    world = ranks(cfg.launch.nproc, cfg.launch.mode)
    components = check(cfg, world)

    # Heavy, and therefore behind the check: mistakes of the command line are answered at once.
    from mft.data.datasets import dataset
    from mft.hardware import quiet_libraries

    quiet_libraries()
    settings = cast("DataSettings", OmegaConf.to_object(cfg.data))
    tokenizer, cuts = components.model.tokenizer(), components.rows.splits_samples
    data = dataset(components.named_tasks, settings, tokenizer, cfg.cache_dir, cuts)
    return PreparedData(cfg, settings, world, data, components.rows, console())


def report(data: PreparedData, overrides: Sequence[str]) -> None:
    """Prints the mixture and notes; writes the account of each task, dropped rows, a picture of lengths."""
    from omegaconf import OmegaConf

    from mft.config.overrides import key_of
    from mft.config.schema import batch_sizes
    from mft.data import mixture
    from mft.data.loader import BatchLoader
    from mft.data.report import notes
    from mft.training.panels import cannot_draw
    from mft.training.plots import length_histogram

    dataset, terminal = data.dataset, data.terminal
    train = cast("TrainSettings", OmegaConf.to_object(data.cfg.train))
    batch, shares = batch_sizes(train, data.world), [task.share for task in dataset.tasks]
    padding = dataset.tokenizer.pad_token_id
    loader = BatchLoader(dataset.stores, data.rows, batch, 0, padding, train, data.settings, shares)
    mixed = loader.mixture(dataset.names)
    terminal.print(mixture.table(mixed, data.settings))
    for note in notes(dataset.stores, dataset.names):
        terminal.print(note, markup=False)
    # Beside the runs of this name, and not in a dated folder that would look like one of them.
    is_placed = any(key_of(override) in ("output_dir", "hydra.run.dir") for override in overrides)
    output_dir = Path(data.cfg.output_dir)
    folder = output_dir / "report" if is_placed else output_dir.parent / "data"
    dataset.write_report(folder)
    write_json(folder / "mixture.json", mixed)
    lengths = {name: store.lengths_N for name, store in zip(dataset.names, dataset.stores, strict=True)}
    why_not = cannot_draw()
    picture = why_not or length_histogram(lengths, data.settings.seq_length, folder)
    dropped = sum(sum(store.report["dropped"].values()) for store in dataset.stores)
    for title, path in (
        ("numbers", folder / "data.json"),
        ("mixture", folder / "mixture.json"),
        (f"{dropped:,} dropped rows", folder / "dropped.jsonl"),
        ("picture", picture),
    ):
        terminal.print(f"{title:<18} {path}", soft_wrap=True, markup=False)


def show(data: PreparedData, samples_per_task: int, only: str) -> None:
    """Prints samples as the model sees them, of all tasks or one; what carries loss is green, or in ⟦ ⟧."""
    from rich.text import Text

    from mft.data.cache.store import Samples
    from mft.data.report import spans, unread_notes
    from mft.data.sampler import spread

    names, stores, terminal = data.dataset.names, data.dataset.stores, data.terminal
    if only and only not in names:
        hint = nearest(only, names) or "."
        raise UserError(f"task={only}: there is no such task{hint} Tasks: {', '.join(names)}.")
    samples = Samples(stores, "train", data.settings.limit)
    opening, closing = ("", "") if terminal.is_terminal else ("⟦", "⟧")
    for i in spread(samples, samples_per_task).tolist():
        sample = samples.sample(i)
        name = names[sample.task]
        if only and name != only:
            continue
        trained = int(sample.trained_S[1:].sum())  # the first token is predicted from nothing
        title = f"{name}: {samples.origin(i)}: {len(sample.ids_S)} tokens, {trained} trained"
        terminal.print(Text(title, style="bold"), soft_wrap=True)
        body = Text()
        for text, learned in spans(sample.ids_S, sample.trained_S, data.dataset.tokenizer):
            body.append(*((f"{opening}{text}{closing}", "bold green") if learned else (text, "dim")))
        terminal.print(body, soft_wrap=True)
        terminal.print()
    shown = [names.index(only)] if only else range(len(names))
    for note in unread_notes([stores[k] for k in shown], [names[k] for k in shown]):
        terminal.print(note, markup=False, soft_wrap=True)
    mark, end = "green" if terminal.is_terminal else "⟦ ⟧", data.dataset.tokenizer.eos_token
    terminal.print(f"{mark}: what carries loss, up to and with the end of sequence {end}", markup=False)


def without_task_name(overrides: Sequence[str], config_dirs: Sequence[Path]) -> tuple[list[str], str]:
    """Takes task=NAME out of overrides where NAME is a task, and not an option of the config group.

    Returns (the other overrides, the task's name or "").
    """
    from mft.config.overrides import group_options

    # task=docstring may compose the option docstring, or name a task that data.paths already has.
    options = group_options("task", config_dirs)
    rest, only = [], ""
    for override in overrides:
        key, _, value = override.partition("=")
        if key == "task" and value.isidentifier() and value not in options:
            only = value
        else:
            rest.append(override)
    return rest, only
