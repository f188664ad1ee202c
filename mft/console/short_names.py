"""Short names that tell runs apart in a legend: `coba · 6e-2 · s2`."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

ROOM = 20
"""Characters of a name: what MLflow's legends and tables show of it."""

SEPARATOR = " · "

SPEAKS_FOR_ITSELF = re.compile(r"[A-Za-z_][\w.+-]*")
"""The option of a group that needs no hint of the group beside it; not none or 4bit."""

SAYS_NOTHING = ("none", "null", "true", "false", "base", "default", "auto")

SHORTEST = 4
"""Characters to which a word is cut at least, so that it can be recognised."""

NUMBER = re.compile(r"([^\d ]+ |s)?[-+.\deE]*")
"""A word that is not cut, since a part of a number is another number."""


def short_names(
    settings: Sequence[Mapping[str, str]], kept: Sequence[str] = (), room: int = ROOM
) -> list[str]:
    """Returns a name for each run, all different and of at most `room` characters.

    settings: {dotted key: value} of each run, as on a command line; values that are the same in all of them
    are left out where there are several. kept: for each run the name that it has already, "" for none.
    """
    columns = _columns(settings)
    tokens = [[column[row] for column in columns] for row in range(len(settings))]
    shown = _within(tokens, room) if settings else []
    names: list[str] = []
    taken = {name for name in kept if name}
    for row, words in enumerate(shown):
        name = kept[row] if row < len(kept) else ""
        if not name:
            name = _free(_joined(words, room, whole=len(settings) == 1) or "as given", taken, room)
            taken.add(name)
        names.append(name)
    return names


def _columns(settings: Sequence[Mapping[str, str]]) -> list[list[str]]:
    """Returns for every key that differs the word of each run, what tells most first and the seed last."""
    keys = list(dict.fromkeys(key for setting in settings for key in setting))
    if len(settings) > 1:
        keys = [key for key in keys if len({setting.get(key) for setting in settings}) > 1]
    keys.sort(key=_rank)
    lasts = [key.rpartition(".")[2] for key in keys]
    hints = [last if lasts.count(last) == 1 else key for key, last in zip(keys, lasts, strict=True)]
    return [
        [_word(key, hint, setting[key]) if key in setting else "" for setting in settings]
        for key, hint in zip(keys, hints, strict=True)
    ]


def _rank(key: str) -> int:
    """Options of groups, the learning rate, other values, the seed of the training."""
    return 3 if key == "train.seed" else 1 if key.endswith(".lr") else 2 if "." in key else 0


def _word(key: str, hint: str, value: str) -> str:
    """Returns the word for a value: 6e-2 for optimizer.lr=0.06, s2 for train.seed=2, rank 16 for peft.rank=16."""
    text = _plain(value)
    if key == "train.seed":
        return f"s{text}"
    if key.endswith(".lr"):
        return _power(text)
    group = "." not in key
    says = SPEAKS_FOR_ITSELF.fullmatch(text) and text.lower() not in SAYS_NOTHING
    if key.endswith(("path", "paths")) or (group and (says or "+" in text)):
        return text
    return f"{hint} {text}"


def _plain(value: str) -> str:
    """Returns a value without brackets and quotes: x+y for [a/x,b/y], paths by their last part."""
    text = value.strip()
    parts = text[1:-1].split(",") if text.startswith("[") and text.endswith("]") else [text]
    parts = [part.strip().strip("'\"") for part in parts]
    parts = [part.rstrip("/").rpartition("/")[2] if "/" in part else part for part in parts]
    return " ".join("+".join(_number(part) for part in parts).split())


def _number(text: str) -> str:
    try:
        number = float(text)
    except ValueError:
        return text
    return f"{number:g}" if re.fullmatch(r"[-+.\deE]+", text) else text  # not nan, inf or 1_000


def _power(text: str) -> str:
    """Returns 6e-2 for 0.06, rounded to 3 digits; text that is no number as it is."""
    try:
        mantissa, _, exponent = f"{float(text):.2e}".partition("e")
    except ValueError:
        return text
    if not exponent:  # inf
        return text
    return f"{float(mantissa):g}e{int(exponent)}" if int(exponent) else f"{float(mantissa):g}"


def _within(tokens: Sequence[Sequence[str]], room: int) -> list[list[str]]:
    """Returns the words of each run, cut where a name would be too long but still different in each column."""
    caps = [max(map(len, column)) for column in zip(*tokens, strict=True)]
    shown = [list(words) for words in tokens]
    while max(len(SEPARATOR.join(filter(None, words))) for words in shown) > room:
        wide = sorted(range(len(caps)), key=lambda place: -caps[place])
        for place in wide:
            column = [words[place] for words in tokens]
            cut = [word if NUMBER.fullmatch(word) else _cut(word, caps[place] - 1) for word in column]
            if caps[place] > SHORTEST and len(set(cut)) == len(set(column)):
                caps[place] -= 1
                for words, word in zip(shown, cut, strict=True):
                    words[place] = word
                break
        else:
            return shown
    return shown


def _cut(word: str, length: int) -> str:
    """Returns a word of at most so many characters, its middle left out: versions differ at the end."""
    if len(word) <= length:
        return word
    tail = (length - 1) // 2
    return f"{word[: length - 1 - tail]}…{word[len(word) - tail :]}"


def _joined(words: Sequence[str], room: int, whole: bool) -> str:
    """Returns words as one name; whole: whether a word that does not fit is left out instead of cut."""
    words = [word for word in words if word]
    while whole and len(words) > 1 and len(SEPARATOR.join(words)) > room:
        words.pop()
    return SEPARATOR.join(words)[:room].rstrip(" ·")


def _free(name: str, taken: set[str], room: int) -> str:
    """Returns a name that is not taken, with a number where it is."""
    number, free = 1, name
    while free in taken:
        number += 1
        ending = f" #{number}"
        free = f"{name[: room - len(ending)].rstrip(' ·')}{ending}"
    return free
