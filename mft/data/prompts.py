"""The held-out prompts of train.prompts."""

from __future__ import annotations

from pathlib import Path

from mft.batch import ROLES, Prompt
from mft.data.readers import Rows
from mft.data.row_fields import RowError, must_be, required, text_of
from mft.errors import UserError, nearest_sibling, shortened


def read_prompts(path: Path) -> list[Prompt]:
    """Reads a file of prompts: chatML rows, of which a last bot turn is the expected answer.

    It may be compressed, or of any other kind that tasks are read from. Turns are not held to the order of
    training rows: an answer can be asked for after any turns, a human one among them.
    Raises UserError with file and line for a row that cannot be read.
    """
    if not path.is_file():
        raise UserError(f"train.prompts={path} is not a file{nearest_sibling(path) or '.'}")
    prompts = []
    try:
        for file, line, row in Rows([path]):
            try:
                if isinstance(row, RowError):
                    raise row
                turns = _turns(row)
            except RowError as error:
                raise error.at(file, line) from error
            expected = turns.pop()["content"] if turns[-1]["role"] == "assistant" else ""
            prompts.append(Prompt(str(row.get("data_name", "")), turns, expected))
    except UserError as error:
        raise UserError(f"train.prompts: {error}") from error
    if not prompts:
        raise UserError(f"train.prompts={path} holds no prompts.")
    return prompts


def _turns(row: object) -> list[dict[str, str]]:
    """Returns the turns of a row; raises RowError that says what is wrong with it."""
    rounds = required(row, "chat_rounds")
    if not isinstance(rounds, list):
        raise must_be("chat_rounds", "a list of rounds", rounds)
    turns = []
    for i, fields in enumerate(rounds):
        place = f"chat_rounds[{i}]"
        role, content = (
            text_of(required(fields, key, place, "round"), f"{place}.{key}") for key in ("role", "content")
        )
        if role not in ROLES:
            raise RowError(f"{place}.role", f"{shortened(role)} is none of {', '.join(ROLES)}")
        turns.append({"role": ROLES[role], "content": content})
    if all(turn["role"] != "user" for turn in turns):
        raise RowError("chat_rounds", "a human turn to be answered is missing")
    return turns
