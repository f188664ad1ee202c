"""Text of others stays text in Markdown."""

import pytest

from mft.console.markdown import code, fenced


def test_a_block_is_not_ended_by_what_is_in_it():
    assert fenced("a\r\n`````\rb").splitlines() == ["``````", "a", "`````", "b", "``````"]
    assert fenced("x") == "```\nx\n```"


@pytest.mark.parametrize(
    ("text", "shown"), [("a", "` a `"), ("a\n# b", "` a # b `"), ("``x`", "``` ``x` ```"), ("", "")]
)
def test_code_stays_on_its_line(text, shown):
    assert code(text) == shown
