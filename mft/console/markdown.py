"""Text of others in Markdown: as code, whose end it cannot write, so that it is never structure or HTML."""

from __future__ import annotations

import re


def fenced(text: str) -> str:
    """Returns text as a block of code."""
    text = text.replace("\r\n", "\n").replace("\r", "\n")
    fence = "`" * max(3, _longest(text) + 1)
    return f"{fence}\n{text}\n{fence}"


def code(text: str) -> str:
    """Returns text as code within a line, its white space as single blanks; "" for none."""
    line = " ".join(text.split())
    ticks = "`" * (_longest(line) + 1)
    return f"{ticks} {line} {ticks}" if line else ""


def _longest(text: str) -> int:
    return max(map(len, re.findall("`+", text)), default=0)
