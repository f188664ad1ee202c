"""The held-out prompts of train.prompts."""

from __future__ import annotations

from pathlib import Path

from mft.batch import Prompt
from mft.data.formats import Chat
from mft.data.readers import Rows
from mft.data.row_fields import RowError
from mft.errors import UserError


def read_prompts(path: Path) -> list[Prompt]:
    """Reads a file of prompts: chatML rows, of which a last bot turn is the expected answer.

    Raises UserError with file and line for a row that cannot be read.
    """
    if not path.is_file():
        raise UserError(f"train.prompts={path} is not a file.")
    prompts = []
    try:
        # Read as training rows are: what training would refuse is refused here, too.
        for file, line, row in Rows([path]):
            try:
                if isinstance(row, RowError):
                    raise row
                messages = Chat().messages(row)
            except RowError as error:
                raise error.at(file, line) from error
            turns = [{"role": message.role, "content": message.content} for message in messages]
            expected = turns.pop()["content"] if turns[-1]["role"] == "assistant" else ""
            prompts.append(Prompt(str(row.get("data_name", "")), turns, expected))
    except UserError as error:
        raise UserError(f"train.prompts: {error}") from error
    if not prompts:
        raise UserError(f"train.prompts={path} holds no prompts.")
    return prompts
