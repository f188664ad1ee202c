"""The held-out prompts of train.prompts: chatML rows, of which a last bot turn is the expected answer."""

from __future__ import annotations

import codecs
import json
from pathlib import Path
from typing import Any

from mft.batch import ROLES, Prompt
from mft.errors import UserError, shortened


def read_prompts(path: Path) -> list[Prompt]:
    """Reads a JSONL file of prompts: chatML rows (`chat_rounds`); a last bot turn is the expected answer.

    Raises UserError with file and line for a row that cannot be read.
    """
    if not path.is_file():
        raise UserError(f"train.prompts={path} is not a file.")
    prompts = []
    # split at line feeds alone: the text of a row may hold the line separators of Unicode
    for number, line in enumerate(path.read_bytes().removeprefix(codecs.BOM_UTF8).split(b"\n"), start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line.decode())
            turns = _turns(row)
        except UnicodeDecodeError as error:
            where = f"byte {line[error.start : error.start + 1]!r} at byte {error.start} of the line"
            raise UserError(f"train.prompts: {path}:{number}: is not UTF-8: {where}.") from error
        except (ValueError, RecursionError) as error:
            shown = shortened(line.decode(errors="replace"))
            raise UserError(
                f"train.prompts: {path}:{number}: is not a chatML row ({error}): {shown}"
            ) from error
        expected = turns.pop()["content"] if turns[-1]["role"] == "assistant" else ""
        prompts.append(Prompt(str(row.get("data_name", "")), turns, expected))
    if not prompts:
        raise UserError(f"train.prompts={path} holds no prompts.")
    return prompts


def _turns(row: Any) -> list[dict[str, str]]:
    """Returns the turns of a row; raises ValueError that says what is wrong with it."""
    rounds = row.get("chat_rounds") if isinstance(row, dict) else None
    if not isinstance(rounds, list):
        raise ValueError("an object with the list chat_rounds is expected")
    turns = []
    for i, turn in enumerate(rounds):
        role, content = (turn.get(key) if isinstance(turn, dict) else None for key in ("role", "content"))
        if not isinstance(role, str) or not isinstance(content, str):
            raise ValueError(f"chat_rounds[{i}]: an object with the texts role and content is expected")
        if role not in ROLES:
            raise ValueError(f"chat_rounds[{i}].role: system, human (user) or bot (assistant) is expected")
        turns.append({"role": ROLES[role], "content": content})
    if "user" not in [turn["role"] for turn in turns]:
        raise ValueError("chat_rounds: a human turn to be answered is expected")
    return turns
