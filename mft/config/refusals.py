"""What OmegaConf says of a value, in our words. The patterns are those of OmegaConf 2.3."""

from __future__ import annotations

import re

from mft.errors import nearest

REFUSALS = (
    (r"could not be converted to Integer", "must be an integer"),
    (r"type hint 'Union\[int, str\]'", "must be an integer, or a word such as auto"),
    (r"could not be converted to Float", "must be a number"),
    (r"is not a valid bool", "must be true or false"),
    (r"Cannot convert '\w+' to string|converted to String|is not a subclass of str", "must be a string"),
    (
        r"Invalid value assigned|DictConfig with ListConfig|to ListConfig|not a ListConfig",
        "must be a list, such as [a,b]",
    ),
    (r"is not a DictConfig|to DictConfig|subclass of [A-Z]|to Dict\[", "must be a mapping, such as {a: 1}"),
    (r"is not Optional|None to non-optional|Incompatible value 'None'", "must not be null"),
    (r"does not support deletion", "a setting cannot be removed; leave it as it is, or set another value"),
)
"""Pattern in OmegaConf's message about a value → our words; the first match counts."""

REASON = (
    r"Value '|Invalid (value|type)|is not Optional|does not support deletion|Cannot (merge|convert 'list')"
)
"""Finds the line in which OmegaConf says what is wrong with a value."""


def plainly(refusal: str) -> str:
    """Returns OmegaConf's message about a value in plain words, e.g. "must be an integer"."""
    if match := re.search(r"Invalid value '(.*)', expected one of \[(.*)\]", refusal):
        value, options = match.groups()
        return f"must be one of {options}{nearest(value, options.split(', '))}"
    return next((plain for pattern, plain in REFUSALS if re.search(pattern, refusal)), refusal)


def ended(sentence: str) -> str:
    """Returns a sentence with a full stop, unless it ends with a question."""
    return sentence if sentence.endswith(("?", ".")) else f"{sentence}."
