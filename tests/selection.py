"""What a module's fixture has to play: only the cases whose tests were selected, since each is a run of its
own."""

from __future__ import annotations

from typing import Any

import pytest


def long(*values: Any) -> Any:
    """Returns a test's parameters, run by `make check-all` only."""
    return pytest.param(*values, marks=pytest.mark.long)


def selected(request: pytest.FixtureRequest, *names: str) -> set[Any]:
    """Returns what parameters of these names the selected tests of the fixture's module have: tuples, if
    several."""
    found = set()
    for item in request.session.items:
        parameters = getattr(getattr(item, "callspec", None), "params", {})
        if getattr(item, "module", None) is request.module and all(name in parameters for name in names):
            values = tuple(parameters[name] for name in names)
            found.add(values if len(names) > 1 else values[0])
    return found
