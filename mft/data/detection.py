"""Which format the rows of a task have, and which rows no format may read."""

from __future__ import annotations

from collections.abc import Mapping

from mft.data.formats import KNOWN, Format, Turns
from mft.data.row_fields import carries
from mft.errors import UserError, shortened

QUESTIONS = ("prompt", "instruction", "question", "query", "input", "problem")
ANSWERS = ("answer", "answers", "completion", "response", "output", "solution", "target")

OWN_NAMES = "format: {_target_: mft.data.formats.Pair, prompt: my_question, answer: my_answer}"


def recognise(row: object, task: str) -> tuple[str, Format] | None:
    """Returns name and format of a row, the first of KNOWN that it fits; None where it fits none.

    Raises UserError, which names the task, for a row that this format would misread.
    """
    # Names are tried in the order of KNOWN: a row with messages and a text rendered of them is messages.
    for name, row_format in KNOWN.items():
        if row_format.fits(row):
            if reason := _misread(name, row):
                raise UserError(f"task.{task}: {reason}.")
            return name, row_format
    return None


def unrecognised(row: Mapping[str, object], task: str) -> UserError:
    """Returns the error for a task of which no row fits a format; row: its first one that is an object."""
    marks = [known.FIELD if isinstance(known, Turns) else known.describe() for known in KNOWN.values()]
    fields = shortened(", ".join(list(row)[:12]) or "none")
    reason = _misread("", row) or (
        f"no format fits its rows; fields of the first one: {fields}. Known: {', '.join(marks)}. For other "
        f"names choose one in the task's yaml, e.g. {OWN_NAMES}"
    )
    return UserError(f"task.{task}: {reason}")


def _misread(name: str, row: Mapping[str, object]) -> str:
    """Returns why a row must not be read by the format of this name, "" where it may.

    Preferences would be trained as plain answers, the rejected ones among them, and a pair as text with its
    question.
    """
    if carries(row.get("chosen")) and carries(row.get("rejected")):
        return (
            "its rows are preferences (chosen, rejected), which mft does not train; to train on the "
            f"chosen answers alone, name the fields in the task's yaml, e.g. {OWN_NAMES}"
        )
    if name == "prompt_completion" and isinstance(row.get("label"), bool):
        return (
            "its rows are judged completions (prompt, completion, label), and those with label: false would "
            "be trained, too; remove them, and write format: prompt_completion into the task's yaml"
        )
    question, answer = (next((f for f in names if carries(row.get(f))), "") for names in (QUESTIONS, ANSWERS))
    if name == "text" and question and answer:
        return (
            f"its rows have a text beside {question} and {answer}: as plain text the questions would be "
            f"trained, too; name the format in the task's yaml, {OWN_NAMES} or format: text"
        )
    return ""
