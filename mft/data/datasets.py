"""The data of a run: its tasks, each with its token cache, the same for `mft train` and for `mft data`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from mft.data import report
from mft.data.cache.store import Store, prepare
from mft.data.duplicates import mark_duplicates
from mft.data.formats import Text
from mft.data.settings import DataSettings
from mft.data.task import Task, all_tasks
from mft.data.template_choice import adopt, named
from mft.data.tokenize import Encoder
from mft.errors import UserError
from mft.files.json_file import write_json

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True)
class Dataset:
    """The data of a run."""

    tasks: list[Task]
    stores: list[Store]
    """One for each task."""
    encoder: Encoder
    """What made them of rows."""

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
        """The tokenizer as it is saved with the model: with the chat template, and its end of turn."""
        return self.encoder.tokenizer

    def write_report(self, folder: Path) -> None:
        """Writes data.json, the account of each task, and dropped.jsonl, every row that became no sample."""
        accounts = report.as_json(self.stores, self.names)
        paths = {task.name: {"paths": [*task.paths, *task.valid]} for task in self.tasks}
        write_json(folder / "data.json", {name: accounts[name] | paths[name] for name in self.names})
        report.write_dropped(folder / "dropped.jsonl", self.stores, self.names)


def dataset(
    tasks: Mapping[str, Task],
    settings: DataSettings,
    tokenizer: PreTrainedTokenizerBase,
    cache_dir: str,
    splits_samples: bool = False,
    first: bool = True,
) -> Dataset:
    """Returns the data of a run, tokenised where the cache does not have it.

    tasks: the named ones, beside those of settings.paths; splits_samples: whether rows cut samples anywhere
    (data=concat); first: this process tokenises, else it waits for the one that does. Raises UserError as
    `prepare` does, and for conversations that would be cut: an answer would lose its question.
    """
    template = named(settings.template, settings.role_markers, tokenizer)
    adopt(tokenizer, template)  # before the encoder, which takes the EOS that the template may change
    chosen = all_tasks(tasks, settings.paths)
    for task in chosen if splits_samples else ():
        name, row_format = task.find_format()
        if not isinstance(row_format, Text):
            raise UserError(
                f"task.{task.name}: its rows are conversations ({name}), which data=concat would cut; "
                "it is for plain text (the field `text`). Choose data=pack or data=pad."
            )
    encoder = Encoder(tokenizer, template)
    stores = [prepare(task, encoder, settings, cache_dir, first) for task in chosen]
    mark_duplicates(stores, settings.duplicates)
    return Dataset(chosen, stores, encoder)
