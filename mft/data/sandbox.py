"""Bounds for chat templates from outside: passes of loops and calls, characters, and time of one rendering.

transformers renders chat templates in Jinja's sandbox, which keeps them from the machine but lets them run
and grow for ever. `bound` puts an environment in its place that counts: every loop, call, filter, operator
and output goes through a method here and pays for what it does, before it does it where the result could be
huge. Private of transformers (read in 5.23): `chat_template_utils._compile_jinja_template` and its environment.
"""

from __future__ import annotations

import re
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from jinja2 import Template, nodes, pass_context, pass_environment
from jinja2.exceptions import TemplateRuntimeError
from jinja2.runtime import Macro
from jinja2.sandbox import ImmutableSandboxedEnvironment

PASSES = 1_000_000
"""Passes of loops, calls, filters and operators in one rendering; a long conversation takes some
thousands."""
CHARACTERS, PER_CHARACTER = 20_000_000, 100
"""Characters that one rendering may make on the way, and how many more for each one that it is given."""
SECONDS = 10.0
LARGEST = 1_000_000
"""The largest number that a function or filter may be given: it may be a width or a count."""
DIGITS = 100_000
"""Bits of the largest number that may be computed."""
AT_ONCE = 1000
"""Passes of a loop that are paid for at once; longer loops pay for each."""
WIDE = re.compile(r"\d{6}")  # a width in a format string
EXPANDS = frozenset(("tojson", "string", "pprint", "join", "format", "urlencode", "xmlattr"))
"""Filters that write out what lists and objects hold, however often they hold it."""


class TooMuch(TemplateRuntimeError):
    """A template that asks for more than a rendering may take."""


class Budget:
    """What one rendering may still take."""

    def __init__(self, messages: Any):
        """messages: what the template is given; counted once the characters run short, which they hardly ever
        do."""
        self.passes, self.characters, self.messages = PASSES, CHARACTERS, messages
        self.until = time.monotonic() + SECONDS

    def spend(self, passes: int, characters: int = 0) -> None:
        """Raises TooMuch where that is more than what is left; looks at the clock now and then."""
        self.passes -= passes
        self.characters -= characters
        if self.passes < 0 or self.characters < 0 or not self.passes & 127:
            self.judge()

    def judge(self) -> None:
        """Raises TooMuch where more was spent than there was."""
        if self.characters < 0 and self.messages:
            given = [
                value
                for message in self.messages
                if isinstance(message, Mapping)
                for value in message.values()
            ]
            self.characters, self.messages = self.characters + PER_CHARACTER * sum(map(_size, given)), ()
        if self.passes < 0:
            raise TooMuch(f"it takes more than {PASSES:,} passes of loops and calls for one conversation")
        if self.characters < 0:
            raise TooMuch(f"it makes more than {CHARACTERS:,} characters for one conversation")
        if time.monotonic() > self.until:
            raise TooMuch(f"it takes longer than {SECONDS:.0f} seconds for one conversation")

    def deep(self, value: Any) -> None:
        """Pays for all that a value holds, at every depth."""
        if isinstance(value, str):
            self.spend(0, len(value))
        elif isinstance(value, Mapping):
            for key, inner in value.items():
                self.spend(1, _size(key))
                self.deep(inner)
        elif isinstance(value, list | tuple | set):
            for inner in value:
                self.spend(1)
                self.deep(inner)
        else:
            self.spend(0, _size(value))


class BoundedTemplate(Template):
    """A template of which every rendering has a budget of its own."""

    def render(self, *args: Any, **kwargs: Any) -> str:
        """See jinja2."""
        self.environment.budget = Budget(kwargs.get("messages"))  # type: ignore[attr-defined]
        return super().render(*args, **kwargs)


class Bounded(ImmutableSandboxedEnvironment):
    """Jinja's sandbox, in which a rendering pays for what it does."""

    template_class = BoundedTemplate
    intercepted_binops = frozenset(("*", "**", "+", "%"))

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **{"finalize": _output} | kwargs)
        self.budget = Budget(())
        self.text = 0  # characters that stand in the template itself
        self.filters |= {"_pass": _pass, "_join": _join, "_apply": _apply}
        self.globals.pop("lipsum", None)  # which writes as many words as it is asked for

    def _parse(self, source: str, name: str | None, filename: str | None) -> nodes.Template:
        template = super()._parse(source, name, filename)
        self.text = _text_in(template)
        return _rewritten(template)

    def call(__self, __context: Any, __obj: Any, *args: Any, **kwargs: Any) -> Any:
        """See jinja2; the names of the arguments are not those of any keyword."""
        __self.budget.spend(1, __self.text if isinstance(__obj, Macro) else 0)
        if args or kwargs:
            method = getattr(__obj, "__wrapped__", __obj)
            _grow(
                __self.budget,
                getattr(method, "__name__", ""),
                getattr(method, "__self__", None),
                args,
                kwargs,
            )
        result = super().call(__context, __obj, *args, **kwargs)
        __self.budget.spend(0, _size(result))
        return result

    def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
        """See jinja2."""
        if operator == "+" and isinstance(left, str) and isinstance(right, str):
            self.budget.spend(1, len(left) + len(right))
            return left + right
        numbers = isinstance(left, int) and isinstance(right, int)
        if numbers and operator in ("*", "**"):
            bits = left.bit_length() * right if operator == "**" else left.bit_length() + right.bit_length()
            if bits > DIGITS:
                raise TooMuch(f"it computes a number of more than {DIGITS:,} bits")
        elif operator == "*":
            count, sized = (left, right) if isinstance(left, int) else (right, left)
            self.budget.spend(0, _size(sized) * count if isinstance(count, int) and count > 0 else 0)
        elif operator == "%" and isinstance(left, str):
            _grow(self.budget, "format", left, right if isinstance(right, tuple) else (right,), {})
        self.budget.spend(1, 0 if numbers else _size(left) + _size(right))
        return super().call_binop(context, operator, left, right)


def bound() -> None:
    """Lets transformers render chat templates in our environment, in this process from now on."""
    from transformers.utils import chat_template_utils

    if chat_template_utils.ImmutableSandboxedEnvironment is not Bounded:
        chat_template_utils.ImmutableSandboxedEnvironment = Bounded  # type: ignore[misc]
        chat_template_utils._compile_jinja_template.cache_clear()


def _rewritten(template: nodes.Template) -> nodes.Template:
    """Lets loops, joined texts and filters pass through the filters below."""
    for loop in list(template.find_all(nodes.For)):
        cost = nodes.Const(sum(map(_text_in, loop.body)))
        loop.iter = _filter(loop.iter, "_pass", [cost], loop.lineno)
    _replace(template)
    return template


def _replace(node: nodes.Node) -> None:
    for name, value in list(node.iter_fields()):
        if isinstance(value, list):
            setattr(node, name, [_replaced(inner) for inner in value])
        elif isinstance(value, nodes.Node):
            setattr(node, name, _replaced(value))


def _replaced(node: Any) -> Any:
    if not isinstance(node, nodes.Node):
        return node
    _replace(node)
    if isinstance(node, nodes.Concat):
        return _filter(nodes.List(node.nodes, lineno=node.lineno), "_join", [], node.lineno)
    if isinstance(node, nodes.Filter) and not node.name.startswith("_"):
        node.args = [nodes.Const(node.name, lineno=node.lineno), *node.args]
        node.name = "_apply"
    return node


def _filter(node: Any, name: str, args: list[Any], line: int) -> nodes.Filter:
    return nodes.Filter(node, name, args, [], None, None, lineno=line)


def _text_in(node: nodes.Node) -> int:
    """Returns the characters of texts and literals that stand in the source of a node."""
    texts = [node, *node.find_all((nodes.TemplateData, nodes.Const))]
    found = [getattr(text, "data", getattr(text, "value", None)) for text in texts]
    return sum(len(text) for text in found if isinstance(text, str))


@pass_environment
def _output(environment: Any, value: Any) -> Any:
    budget = environment.budget
    if type(value) is str:  # written out, since it is by far the most frequent
        budget.characters -= len(value)
        if budget.characters < 0:
            budget.judge()
    else:
        budget.deep(value)
    return value


@pass_context
def _pass(context: Any, items: Any, text: int) -> Any:
    """Pays for the passes of a loop over the items; text: characters that each writes by itself."""
    budget = context.environment.budget
    budget.judge()
    if hasattr(items, "__len__") and len(items) <= AT_ONCE:
        budget.spend(len(items), len(items) * text)
        return items
    return _counted(budget, items, text)


def _counted(budget: Budget, items: Any, text: int) -> Iterator[Any]:
    for item in items:
        budget.spend(1, text)
        yield item


@pass_context
def _join(context: Any, parts: list[Any]) -> str:
    budget, size = context.environment.budget, 0
    for part in parts:
        if isinstance(part, str):
            size += len(part)
        else:
            budget.deep(part)
    budget.spend(1, size)
    return "".join(map(str, parts))


@pass_context
def _apply(context: Any, value: Any, name: str, *args: Any, **kwargs: Any) -> Any:
    budget = context.environment.budget
    budget.spend(1)
    if args or kwargs:
        _grow(budget, name, value, args, kwargs)
    if name in EXPANDS:
        budget.deep(value)
    result = context.environment.call_filter(name, value, args, kwargs, context=context)
    budget.spend(0, _size(result))
    return result


def _grow(budget: Budget, name: str, value: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> None:
    """Pays for the result of a function or filter that could be much larger than what it is given."""
    given = (*args, *kwargs.values())
    for number in given:
        if isinstance(number, int) and abs(number) > LARGEST:
            raise TooMuch(f"it gives {name or 'a function'} a number of more than {LARGEST:,}")
    if name == "join":
        items, separator = (
            (value, given[:1]) if not isinstance(value, str) or not given else (given[0], [value])
        )
        budget.spend(0, _size(items) * sum(map(_size, separator)))
    elif name == "replace" and len(given) > 1:
        budget.spend(0, (_size(value) // max(1, _size(given[0])) + 1) * _size(given[1]))
    elif name == "indent" and given:
        budget.spend(0, (str(value).count("\n") + 1) * _size(given[0]) if isinstance(given[0], str) else 0)
    elif name in ("format", "format_map"):
        if WIDE.search(str(value)):
            raise TooMuch("it formats to a width of more than 99,999 characters")
        for part in given:
            budget.deep(part)
        budget.spend(0, (str(value).count("{") + str(value).count("%")) * max(map(_size, given), default=0))


def _size(value: Any) -> int:
    return len(value) if isinstance(value, str | bytes | list | tuple | dict | set) else 1
