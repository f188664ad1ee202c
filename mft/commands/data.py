"""`mft data report|show|prepare`: the data of a run, looked at or prepared without the run."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mft.errors import UserError, nearest
from mft.files.json_file import write_json

if TYPE_CHECKING:
    from omegaconf import DictConfig
    from rich.console import Console

    from mft.data.datasets import Dataset
    from mft.data.packing import RowBuilder
    from mft.data.settings import DataSettings
    from mft.training.settings import TrainSettings

HELP = """\
mft data report|show|prepare [overrides] [--config-dir DIR]

  mft data report experiment=demo              what becomes of the rows of every task, a picture of the lengths
  mft data show experiment=demo task=docstring n=3
                                               samples as the model will see them, what is trained marked
  mft data prepare experiment=demo             tokenise now, so that a run (on a cluster) starts at once

The overrides are those of `mft train`; nothing is trained, and no model is loaded.
  n=3           (show) samples of each task
  task=NAME     (show) only this task; the name of a folder in data.paths works, too
  output_dir=…  (report) where data.json, mixture.json, dropped.jsonl and lengths.png go: its report/;
                without it outputs/<name>/data
"""

PLAIN_WIDTH = 160  # columns where the output is not a terminal


def data(args: Sequence[str]) -> None:
    """mft data: see HELP."""
    if not args or {"-h", "--help"} & set(args):
        print(HELP, end="")
        return
    commands = {"report": report, "show": show, "prepare": prepare}
    if args[0] not in commands:
        known = ", ".join(commands)
        raise UserError(f"there is no command mft data {args[0]}{nearest(args[0], commands) or '.'} Commands: {known}.")
    commands[args[0]](list(args[1:]))


@dataclass(frozen=True)
class Prepared:
    """A checked config and its data."""

    cfg: DictConfig
    settings: DataSettings
    train: TrainSettings
    world: int
    dataset: Dataset
    rows: RowBuilder


def report(args: list[str]) -> None:
    """Prints the account of each task, and writes it with the list of dropped rows and a picture of the lengths."""
    found = prepared(args)
    from mft.config.overrides import key_of
    from mft.config.schema import batch_sizes
    from mft.data import mixture
    from mft.data import report as account
    from mft.data.loader import BatchLoader
    from mft.training.plots import length_histogram

    known, console = found.dataset, screen()
    loader = BatchLoader(
        known.stores,
        found.rows,
        batch_sizes(found.train, found.world),
        0,
        known.tokenizer.pad_token_id,
        found.train,
        found.settings,
        [task.share for task in known.tasks],
    )
    mixed = loader.mixture(known.names)
    for table in account.tables(known.stores, known.names):
        console.print(table)
    console.print(mixture.table(mixed, found.settings))
    for note in account.notes(known.stores, known.names):
        console.print(note, markup=False)
    given = any(key_of(arg) in ("output_dir", "hydra.run.dir") for arg in args)
    folder = Path(found.cfg.output_dir) / "report" if given else Path(found.cfg.output_dir).parent / "data"
    known.write_report(folder)
    write_json(folder / "mixture.json", mixed)
    lengths = {name: store.lengths_N for name, store in zip(known.names, known.stores, strict=True)}
    picture = length_histogram(lengths, found.settings.seq_length, folder)
    dropped = sum(sum(store.report["dropped"].values()) for store in known.stores)
    for what, path in (
        ("numbers", folder / "data.json"),
        ("mixture", folder / "mixture.json"),
        (f"{dropped:,} dropped rows", folder / "dropped.jsonl"),
        ("picture", picture),
    ):
        console.print(f"{what:<18} {path}", soft_wrap=True, markup=False)


def show(args: list[str]) -> None:
    """Prints samples as the model will see them; what carries loss is coloured, or stands in ⟦ ⟧ without a terminal."""
    args, number, only = show_options(args)
    found = prepared(args)
    from rich.text import Text

    from mft.data import report as account
    from mft.data.cache.store import Samples
    from mft.data.preview import chosen, spans

    known, console = found.dataset, screen()
    if only and only not in known.names:
        allowed = ", ".join(known.names)
        raise UserError(f"task={only}: there is no such task{nearest(only, known.names) or '.'} Tasks: {allowed}.")
    samples = Samples(known.stores, "train", found.settings.limit)
    coloured = console.is_terminal
    for i in chosen(samples, number):
        sample = samples.sample(i)
        name = known.names[sample.task]
        if only and name != only:
            continue
        parts = spans(sample.ids_S, sample.trained_S, known.tokenizer)
        trained = int(sample.trained_S[1:].sum())
        title = f"{name}: {samples.origin(i)}: {len(sample.ids_S)} tokens, {trained} trained"
        console.print(Text(title, style="bold"), soft_wrap=True)
        body = Text()
        for text, learned in parts:
            if not learned:
                body.append(text, style="dim")
            else:
                body.append(text if coloured else f"⟦{text}⟧", style="bold green")
        console.print(body, soft_wrap=True)
        console.print()
    shown = [known.names.index(only)] if only else range(len(known.names))
    for note in account.unread_notes([known.stores[k] for k in shown], [known.names[k] for k in shown]):
        console.print(note, markup=False, soft_wrap=True)
    key = "green" if coloured else "⟦ ⟧"
    console.print(
        f"{key}: what carries loss, up to and with the end of sequence {known.tokenizer.eos_token}", markup=False
    )


def prepare(args: list[str]) -> None:
    """Fills the token cache and says where it is."""
    found = prepared(args)
    from mft.data import report as account

    known, console = found.dataset, screen()
    for table in account.tables(known.stores, known.names):
        console.print(table)
    for name, store in zip(known.names, known.stores, strict=True):
        folder = Path(found.cfg.cache_dir) / "tokens" / store.fingerprint
        console.print(f"{name}: {len(store):,} samples in {folder}", soft_wrap=True, markup=False)


def prepared(args: Sequence[str]) -> Prepared:
    """Returns the data that overrides compose, checked as for a run; raises UserError as `mft train` would."""
    from omegaconf import OmegaConf

    from mft.cli import split_flags
    from mft.config.compose import compose_resolved
    from mft.config.overrides import with_output_dir
    from mft.config.validate import check
    from mft.launch.placement import ranks

    overrides, config_dirs, flags = split_flags(args)
    if flags:
        raise UserError(f"mft data has no flag {flags[0]}; `mft train` has. Flags: --config-dir, --help.")
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
    return Prepared(cfg, settings, train, world, data, components.rows)


def show_options(args: Sequence[str]) -> tuple[list[str], int, str]:
    """Takes n=… out of the arguments, and task=… where it names no option of the config group but a task by its name.

    Returns (the other arguments, n, the task's name or "").
    """
    from mft.cli import split_flags
    from mft.config.overrides import group_options

    _, config_dirs, _ = split_flags(args)
    options = [*group_options("task"), *(p.stem for folder in config_dirs for p in (folder / "task").glob("*.yaml"))]
    rest, number, only = [], 3, ""
    for arg in args:
        key, _, value = arg.partition("=")
        if key == "n":
            if not value.isdigit() or int(value) < 1:
                raise UserError(f"n={value}: a number of samples from 1 is needed, for example n=3.")
            number = int(value)
        elif key == "task" and value.isidentifier() and value not in options:
            only = value
        else:
            rest.append(arg)
    return rest, number, only


def screen() -> Console:
    """Returns the standard output, wide where it is no terminal."""
    from mft.console.screen import console

    found = console()
    return found if found.is_terminal else console(width=PLAIN_WIDTH)
