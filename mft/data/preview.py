"""Samples to be looked at: their text as the model sees it, divided where loss begins and ends."""

from __future__ import annotations

from itertools import pairwise
from typing import TYPE_CHECKING

import numpy as np

from mft.data.cache.store import Samples

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Spans = list[tuple[str, bool]]
"""Stretches of a sample's text, and whether their tokens carry loss."""


def spans(ids_S: np.ndarray, trained_S: np.ndarray, tokenizer: PreTrainedTokenizerBase) -> Spans:
    """Returns the decoded stretches of a sample. A first token never carries loss: nothing comes before it.

    A stretch is what decoding gains by it, since sentencepiece tokenizers leave out a blank at the start of a
    text.
    """
    trained_S = np.array(trained_S)
    trained_S[:1] = False
    borders = [0, *(np.flatnonzero(np.diff(trained_S)) + 1).tolist(), len(ids_S)]
    found: Spans = []
    before = ""
    for start, stop in pairwise(borders):
        text = _decoded(ids_S[:stop], tokenizer)
        # Bytes of one character on both sides of a border decode to another character than alone.
        gained = (
            text.removeprefix(before) if text.startswith(before) else _decoded(ids_S[start:stop], tokenizer)
        )
        found.append((gained, bool(trained_S[start])))
        before = text
    return found


def chosen(samples: Samples, per_task: int) -> list[int]:
    """Returns the numbers of at most `per_task` samples of each task, evenly spaced over its files."""
    found: list[int] = []
    for task in range(len(samples.stores)):
        numbers = np.flatnonzero(samples.task_N == task)
        found += numbers[np.arange(min(per_task, len(numbers))) * len(numbers) // max(1, per_task)].tolist()
    return found


def _decoded(ids_S: np.ndarray, tokenizer: PreTrainedTokenizerBase) -> str:
    return str(
        tokenizer.decode(ids_S.tolist(), skip_special_tokens=False, clean_up_tokenization_spaces=False)
    )
