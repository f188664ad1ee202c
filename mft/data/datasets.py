"""The data of a config: its tokenizer, tasks and token caches, the same for a run and for `mft data`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from omegaconf import DictConfig

from mft import run_folder
from mft.data import report
from mft.data.cache.store import Store, prepare
from mft.data.duplicates import settle
from mft.data.formats import Text
from mft.data.settings import DataSettings
from mft.data.task import Task, all_tasks
from mft.data.template import adopt, named
from mft.data.tokenize import Encoder
from mft.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True)
class Dataset:
    """The chosen tasks, each with its store, and the encoder that made them; the tokenizer has the template."""

    tasks: list[Task]
    stores: list[Store]
    encoder: Encoder

    @property
    def names(self) -> list[str]:
        """Names of the tasks."""
        return [task.name for task in self.tasks]

    @property
    def fingerprints(self) -> dict[str, str]:
        """Hashes of the rows that the stores were made of: `task.<name>` → hash."""
        return {f"task.{name}": store.contents for name, store in zip(self.names, self.stores, strict=True)}

    @property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The tokenizer, as it is saved with the model."""
        return self.encoder.tokenizer

    def write_report(self, folder: Path) -> None:
        """Writes data.json, the account of each task, and dropped.jsonl, every row that became no sample."""
        run_folder.write_json(folder / "data.json", report.as_json(self.stores, self.names))
        report.write_dropped(folder / "dropped.jsonl", self.stores, self.names)


def dataset(
    cfg: DictConfig, data: DataSettings, family: Any, make: Callable[[str], Any], first: bool = True
) -> Dataset:
    """Returns the data of a typed config, tokenised where the cache does not have it.

    family: the model's; make: builds the component at a path of the config; first: this process tokenises, else it
    waits for the one that does. Raises UserError as `prepare` does.
    """
    tokenizer = family.tokenizer()
    template = named(data.template, data.role_markers, tokenizer)
    adopt(tokenizer, template)
    tasks = all_tasks({name: make(f"task.{name}") for name in cfg.task}, list(data.paths))
    encoder = Encoder(tokenizer, template)
    if make("data.rows").cuts_samples:
        _check_texts(tasks)
    stores = [prepare(task, encoder, data, cfg.cache_dir, first) for task in tasks]
    settle(stores, data.duplicates)
    return Dataset(tasks, stores, encoder)


def _check_texts(tasks: Sequence[Task]) -> None:
    """Raises UserError for a task whose rows are no plain text: cut anywhere, an answer would lose its question."""
    for task in tasks:
        name, found = task.settled_format()
        if not isinstance(found, Text):
            raise UserError(
                f"task.{task.name}: its rows are conversations ({name}), which data=concat would cut anywhere; choose "
                "data=pack or data=pad for them, concat is for rows of plain text (the field `text`)."
            )
