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
            name = _free(_joined(words, room) or "as given", taken, room)
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
    """Returns a value's word: 6e-2 for optimizer.lr=0.06, s2 for train.seed=2, rank 16 for peft.rank=16."""
    text = _plain(value)
    if key == "train.seed":
        return f"s{text}"
    if key.endswith(".lr") and (power := _power(text)) != text:
        return power
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
    """Returns the words of each run, cut where a name would be too long but still distinct in each column."""
    columns = [_shorter(column) for column in zip(*tokens, strict=True)]
    lengths = [max(cuts) for cuts in columns]

    def shown() -> list[tuple[str, ...]]:
        now = [cuts[length] for cuts, length in zip(columns, lengths, strict=True)]
        return list(zip(*now, strict=True)) or [()] * len(tokens)

    while max(len(SEPARATOR.join(filter(None, words))) for words in shown()) > room:
        able = [place for place, cuts in enumerate(columns) if lengths[place] > min(cuts)]
        if not able:
            break
        widest = max(able, key=lambda place: lengths[place])
        lengths[widest] = max(length for length in columns[widest] if length < lengths[widest])
    return [list(words) for words in shown()]


def _shorter(column: Sequence[str]) -> dict[int, list[str]]:
    """Returns {length: words of at most that length}, down to where two different words would be the same."""
    longest = max(map(len, column))
    choices: list[dict[int, list[str]]] = []
    for cut in (_without_middle, _without_end):
        cuts = {longest: list(column)}
        for length in range(longest - 1, SHORTEST - 1, -1):
            words = [word if NUMBER.fullmatch(word) else cut(word, length) for word in column]
            if len(set(words)) < len(set(column)) or max(map(len, words)) > length:
                break
            cuts[length] = words
        choices.append(cuts)
    return min(choices, key=min)


def _without_middle(word: str, length: int) -> str:
    tail = (length - 1) // 2  # versions differ at the end
    return word if len(word) <= length else f"{word[: length - 1 - tail]}…{word[len(word) - tail :]}"


def _without_end(word: str, length: int) -> str:
    return word if len(word) <= length else f"{word[: length - 1]}…"


def _joined(words: Sequence[str], room: int) -> str:
    """Returns words as one name, without the last where they do not fit: half a number is another one."""
    words = [word for word in words if word]
    while len(words) > 1 and len(SEPARATOR.join(words)) > room:
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
