"""`mft data report|show|prepare`: inspect or prepare the data of a run, without the run."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mft.commands.arguments import COUNT, Parser, action_of, overrides_in
from mft.console.screen import console
from mft.errors import UserError, nearest
from mft.files.json_file import write_json

if TYPE_CHECKING:
    from omegaconf import DictConfig

    from mft.data.datasets import Dataset
    from mft.data.packing import RowBuilder
    from mft.data.settings import DataSettings
    from mft.training.settings import TrainSettings

STORY = """\
Inspect the data of a run, or prepare it ahead of time.
The overrides are those of `mft train`; nothing is trained, and no model is loaded.

  report       what becomes of the rows of every task, and a picture of the lengths
  show         samples as the model will see them, with what is trained marked
  prepare      tokenise now, so that a run (on a cluster) starts at once

  task=NAME     (show) this task only; the name of a folder in data.paths works, too
  output_dir=…  (report) where data.json, mixture.json, dropped.jsonl and lengths.png go: its report/;
                without it outputs/<name>/data"""

EXAMPLES = """\
  mft data report experiment=demo
  mft data show experiment=demo task=docstring --n 3
  mft data prepare experiment=demo"""

DEFAULT_SAMPLES = 3
"""Samples of each task that `mft data show` prints."""


def parser() -> Parser:
    """Returns the command line of `mft data`."""
    made = Parser(
        "data",
        "report|show|prepare [KEY=VALUE …] [--n N] [--config-dir DIR]",
        STORY,
        EXAMPLES,
        overrides=True,
        actions=("report", "show", "prepare"),
    )
    made.option(
        "--n", takes=COUNT, help=f"(show) samples of each task (default: {DEFAULT_SAMPLES})", formerly=True
    )
    made.composing()
    return made


def command(arguments: Sequence[str]) -> None:
    """Composes the config, prepares its data, and does one of the three."""
    line = parser()
    parsed = line.parse(arguments or ["--help"])
    action, words = action_of(line, parsed.words)
    if parsed.n and action != "show":
        raise UserError(f"mft data {action} has no flag --n; mft data show has.")
    overrides, config_dirs = overrides_in(words), parsed.config_dir or []
    if action == "report":
        report(overrides, config_dirs)
    elif action == "show":
        show(overrides, config_dirs, parsed.n or DEFAULT_SAMPLES)
    else:
        prepare(overrides, config_dirs)


@dataclass(frozen=True)
class PreparedData:
    """A checked config and its tokenised data."""

    cfg: DictConfig
    """The composed config."""

    settings: DataSettings
    """`cfg.data` as an object."""

    train: TrainSettings
    """`cfg.train` as an object."""

    world: int
    """Ranks of the run."""

    dataset: Dataset
    """Tasks, tokenizer and token stores."""

    rows: RowBuilder
    """How samples become rows."""


def report(overrides: Sequence[str], config_dirs: Sequence[Path]) -> None:
    """Prints the account of each task; writes it with the dropped rows and a picture of the lengths."""
    data = prepared(overrides, config_dirs)
    from mft.config.overrides import key_of
    from mft.config.schema import batch_sizes
    from mft.data import mixture
    from mft.data import report as account
    from mft.data.loader import BatchLoader
    from mft.training.plots import length_histogram

    names, stores, terminal = data.dataset.names, data.dataset.stores, console()
    loader = BatchLoader(
        stores,
        data.rows,
        batch_sizes(data.train, data.world),
        0,
        data.dataset.tokenizer.pad_token_id,
        data.train,
        data.settings,
        [task.share for task in data.dataset.tasks],
    )
    mixed = loader.mixture(names)
    for table in account.tables(stores, names):
        terminal.print(table)
    terminal.print(mixture.table(mixed, data.settings))
    for note in account.notes(stores, names):
        terminal.print(note, markup=False)
    placed = any(key_of(override) in ("output_dir", "hydra.run.dir") for override in overrides)
    output_dir = Path(data.cfg.output_dir)
    folder = output_dir / "report" if placed else output_dir.parent / "data"
    data.dataset.write_report(folder)
    write_json(folder / "mixture.json", mixed)
    lengths = {name: store.lengths_N for name, store in zip(names, stores, strict=True)}
    picture = length_histogram(lengths, data.settings.seq_length, folder)
    dropped = sum(sum(store.report["dropped"].values()) for store in stores)
    for title, path in (
        ("numbers", folder / "data.json"),
        ("mixture", folder / "mixture.json"),
        (f"{dropped:,} dropped rows", folder / "dropped.jsonl"),
        ("picture", picture),
    ):
        terminal.print(f"{title:<18} {path}", soft_wrap=True, markup=False)


def show(overrides: Sequence[str], config_dirs: Sequence[Path], samples_per_task: int) -> None:
    """Prints samples as the model sees them; what carries loss is coloured, or in ⟦ ⟧."""
    overrides, only = without_task_name(overrides, config_dirs)
    data = prepared(overrides, config_dirs)
    from rich.text import Text

    from mft.data import report as account
    from mft.data.cache.store import Samples
    from mft.data.sampler import spread

    names, stores, terminal = data.dataset.names, data.dataset.stores, console()
    if only and only not in names:
        raise UserError(
            f"task={only}: there is no such task{nearest(only, names) or '.'} Tasks: {', '.join(names)}."
        )
    samples = Samples(stores, "train", data.settings.limit)
    coloured = terminal.is_terminal
    for i in spread(samples, samples_per_task).tolist():
        sample = samples.sample(i)
        name = names[sample.task]
        if only and name != only:
            continue
        trained = int(sample.trained_S[1:].sum())  # the first token is predicted from nothing
        title = f"{name}: {samples.origin(i)}: {len(sample.ids_S)} tokens, {trained} trained"
        terminal.print(Text(title, style="bold"), soft_wrap=True)
        body = Text()
        for text, learned in account.spans(sample.ids_S, sample.trained_S, data.dataset.tokenizer):
            if not learned:
                body.append(text, style="dim")
            else:
                body.append(text if coloured else f"⟦{text}⟧", style="bold green")
        terminal.print(body, soft_wrap=True)
        terminal.print()
    shown = [names.index(only)] if only else range(len(names))
    for note in account.unread_notes([stores[k] for k in shown], [names[k] for k in shown]):
        terminal.print(note, markup=False, soft_wrap=True)
    mark, end = "green" if coloured else "⟦ ⟧", data.dataset.tokenizer.eos_token
    terminal.print(f"{mark}: what carries loss, up to and with the end of sequence {end}", markup=False)


def prepare(overrides: Sequence[str], config_dirs: Sequence[Path]) -> None:
    """Fills the token cache and says where it is."""
    data = prepared(overrides, config_dirs)
    from mft.data import report as account

    names, stores, terminal = data.dataset.names, data.dataset.stores, console()
    for table in account.tables(stores, names):
        terminal.print(table)
    for name, store in zip(names, stores, strict=True):
        folder = Path(data.cfg.cache_dir) / "tokens" / store.fingerprint
        terminal.print(f"{name}: {len(store):,} samples in {folder}", soft_wrap=True, markup=False)


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

    from mft.data.datasets import dataset
    from mft.hardware import quiet_libraries

    quiet_libraries()
    settings: Any = OmegaConf.to_object(cfg.data)
    train: Any = OmegaConf.to_object(cfg.train)
    tokenizer, cuts = components.model.tokenizer(), components.rows.splits_samples
    data = dataset(components.named_tasks, settings, tokenizer, cfg.cache_dir, cuts)
    return PreparedData(cfg, settings, train, world, data, components.rows)


def without_task_name(overrides: Sequence[str], config_dirs: Sequence[Path]) -> tuple[list[str], str]:
    """Takes task=NAME out of overrides where NAME is a task, and not an option of the config group.

    Returns (the other overrides, the task's name or "").
    """
    from mft.config.overrides import group_options

    options = group_options("task", config_dirs)
    rest, only = [], ""
    for override in overrides:
        key, _, value = override.partition("=")
        if key == "task" and value.isidentifier() and value not in options:
            only = value
        else:
            rest.append(override)
    return rest, only
