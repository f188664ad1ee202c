"""Bounds for untrusted chat templates: loop passes and calls, characters, and time of one rendering.

transformers renders chat templates in Jinja's sandbox, which keeps them from the machine but lets them run
and grow for ever. `bound` puts an environment in its place that counts: every loop, call, filter, operator
and output goes through a method here and pays for what it does, before it does it where the result could be
huge. Private in transformers (as of 5.23): `chat_template_utils._compile_jinja_template` and its environment.
"""

from __future__ import annotations

import re
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence, Sized
from typing import Any

from jinja2 import Template, nodes, pass_context, pass_environment
from jinja2.exceptions import TemplateRuntimeError
from jinja2.runtime import Context, Macro
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.visitor import NodeTransformer

PASSES = 1_000_000
"""Passes of loops, calls, filters and operators in one rendering; a long conversation takes some
thousands."""
CHARACTERS, PER_CHARACTER = 20_000_000, 100
"""Characters that one rendering may make on the way, and how many more for each one that it is given."""
SECONDS = 10.0
LARGEST = 1_000_000
"""The largest number that a function or filter may be given: it may be a width or a count."""
BITS = 100_000
"""Bits of the largest number that may be computed."""
AT_ONCE = 1000
"""Passes of a loop that are paid for at once; longer loops pay for each, since they may be left early."""
WIDE = re.compile(r"\d{6}")
"""A width in a format string that is too large."""
EXPANDS = frozenset(("tojson", "string", "pprint", "join", "format", "urlencode", "xmlattr"))
"""Filters that write out what lists and objects hold, however often they hold it."""


class TooMuch(TemplateRuntimeError):
    """A template that asks for more than a rendering may take."""


class Budget:
    """What one rendering may still take; messages: what the template is given."""

    def __init__(self, messages: Iterable[object] | None):
        self.passes, self.characters, self.messages = PASSES, CHARACTERS, messages or ()
        self.until = time.monotonic() + SECONDS

    def spend(self, passes: int, characters: int = 0) -> None:
        """Raises TooMuch where that is more than what is left; looks at the clock every 128 passes."""
        self.passes -= passes
        self.characters -= characters
        if self.passes < 0 or self.characters < 0 or not self.passes & 127:
            self.judge()

    def judge(self) -> None:
        """Raises TooMuch where more was spent than there was."""
        # What is given is counted only when the characters run short, which they hardly ever do.
        if self.characters < 0 and self.messages:
            turns = [turn for turn in self.messages if isinstance(turn, Mapping)]
            size = sum(_size(value) for turn in turns for value in turn.values())
            self.characters, self.messages = self.characters + PER_CHARACTER * size, ()
        if self.passes < 0:
            raise TooMuch(f"it takes more than {PASSES:,} passes of loops and calls for one conversation")
        if self.characters < 0:
            raise TooMuch(f"it makes more than {CHARACTERS:,} characters for one conversation")
        if time.monotonic() > self.until:
            raise TooMuch(f"it takes longer than {SECONDS:.0f} seconds for one conversation")

    def deep(self, value: object) -> None:
        """Pays for all that a value holds, at every depth."""
        if isinstance(value, Mapping):
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
    """A template with a separate budget for every rendering."""

    def render(self, *args: Any, **kwargs: Any) -> str:
        """See jinja2."""
        # All templates of a process share the environment, so every rendering brings its own budget.
        self.environment.budget = Budget(kwargs.get("messages"))  # type: ignore[attr-defined]
        return super().render(*args, **kwargs)


class Bounded(ImmutableSandboxedEnvironment):
    """Jinja's sandbox, in which a rendering pays for what it does."""

    template_class = BoundedTemplate
    intercepted_binops = frozenset(("*", "**", "+", "%"))

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **{"finalize": _output} | kwargs)
        self.budget = Budget(())
        self.text = 0
        """Characters that stand in the template itself; a macro may write them all."""
        self.filters |= {"_pass": _pass, "_join": _join, "_apply": _apply}
        self.globals.pop("lipsum", None)  # generates any number of words on request

    def _parse(self, source: str, name: str | None, filename: str | None) -> nodes.Template:
        template = super()._parse(source, name, filename)
        self.text = _text_in(template)
        Metering().visit(template)
        return template

    # Mangled names: keywords of the template's own call must not meet those of this method.
    def call(__self, __context: Any, __obj: Any, *args: Any, **kwargs: Any) -> Any:
        """See jinja2."""
        budget = __self.budget
        budget.spend(1, __self.text if isinstance(__obj, Macro) else 0)
        # Jinja's sandbox hands out str.format wrapped; name and text are those of the method inside.
        method = getattr(__obj, "__wrapped__", __obj)
        name, value = getattr(method, "__name__", ""), getattr(method, "__self__", None)
        _grow(budget, name, value, (*args, *kwargs.values()))
        result = super().call(__context, __obj, *args, **kwargs)
        budget.spend(0, _size(result))
        return result

    def call_binop(self, context: Context, operator: str, left: Any, right: Any) -> object:
        """See jinja2."""
        if operator == "+" and isinstance(left, str) and isinstance(right, str):
            self.budget.spend(1, len(left) + len(right))
            return left + right
        if isinstance(left, int) and isinstance(right, int) and operator in ("*", "**"):
            bits = left.bit_length() * right if operator == "**" else left.bit_length() + right.bit_length()
            if bits > BITS:
                raise TooMuch(f"it computes a number of more than {BITS:,} bits")
        elif operator == "*":  # text or a list, repeated
            count, sized = (left, right) if isinstance(left, int) else (right, left)
            self.budget.spend(0, _size(sized) * count if isinstance(count, int) and count > 0 else 0)
        elif operator == "%" and isinstance(left, str):
            _grow(self.budget, "format", left, right if isinstance(right, tuple) else (right,))
        numbers = isinstance(left, int) and isinstance(right, int)
        self.budget.spend(1, 0 if numbers else _size(left) + _size(right))
        return super().call_binop(context, operator, left, right)


def bound() -> None:
    """Lets transformers render chat templates in our environment, in this process from now on."""
    from transformers.utils import chat_template_utils

    if chat_template_utils.ImmutableSandboxedEnvironment is not Bounded:
        chat_template_utils.ImmutableSandboxedEnvironment = Bounded  # type: ignore[misc]
        chat_template_utils._compile_jinja_template.cache_clear()


class Metering(NodeTransformer):
    """Makes loops, joined texts (~) and filters pass through the filters of this module."""

    def visit_For(self, node: nodes.For) -> nodes.For:
        """A loop: its items pass through `_pass`, with the characters that each pass writes by itself."""
        text = nodes.Const(sum(map(_text_in, node.body)))  # before the names below are put in as constants
        self.generic_visit(node)
        node.iter = _filter(node.iter, "_pass", [text], node.lineno)
        return node

    def visit_Concat(self, node: nodes.Concat) -> nodes.Filter:
        """`a ~ b`: Jinja compiles it to a join that no method of the environment sees."""
        self.generic_visit(node)
        return _filter(nodes.List(node.nodes, lineno=node.lineno), "_join", [], node.lineno)

    def visit_Filter(self, node: nodes.Filter) -> nodes.Filter:
        """A filter: it becomes `_apply` with its name as the first argument."""
        self.generic_visit(node)
        node.args = [nodes.Const(node.name, lineno=node.lineno), *node.args]
        node.name = "_apply"
        return node


def _filter(node: nodes.Node, name: str, args: list[nodes.Expr], line: int) -> nodes.Filter:
    return nodes.Filter(node, name, args, [], None, None, lineno=line)


def _text_in(node: nodes.Node) -> int:
    """Returns the characters of texts and literals that stand in the source of a node."""
    literals = [node, *node.find_all((nodes.TemplateData, nodes.Const))]
    texts = [getattr(literal, "data", getattr(literal, "value", None)) for literal in literals]
    return sum(len(text) for text in texts if isinstance(text, str))


@pass_environment
def _output(environment: Bounded, value: object) -> object:
    budget = environment.budget
    if type(value) is str:  # not through `spend`: outputs are by far the most frequent
        budget.characters -= len(value)
        if budget.characters < 0:
            budget.judge()
    else:
        budget.deep(value)
    return value


@pass_context
def _pass(context: Any, items: Iterable[object], text: int) -> Iterable[object]:
    """Pays for the passes of a loop over the items; text: characters that each writes by itself."""
    budget = context.environment.budget
    budget.judge()
    if isinstance(items, Sized) and len(items) <= AT_ONCE:
        budget.spend(len(items), len(items) * text)
        return items
    return _counted(budget, items, text)


def _counted(budget: Budget, items: Iterable[object], text: int) -> Iterator[object]:
    for item in items:
        budget.spend(1, text)
        yield item


@pass_context
def _join(context: Any, parts: list[object]) -> str:
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
    _grow(budget, name, value, (*args, *kwargs.values()))
    if name in EXPANDS:
        budget.deep(value)
    result = context.environment.call_filter(name, value, args, kwargs, context=context)
    budget.spend(0, _size(result))
    return result


def _grow(budget: Budget, name: str, value: object, arguments: Sequence[object]) -> None:
    """Pays for the result of a function or filter that could be much larger than what it is given."""
    if not arguments:
        return
    # Any number may be a width, an indent or a batch size: none that is sensible is this large.
    for number in arguments:
        if isinstance(number, int) and abs(number) > LARGEST:
            raise TooMuch(f"it gives {name or 'a function'} a number of more than {LARGEST:,}")
    first = arguments[0]
    if name == "join":  # items | join(separator), or separator.join(items)
        items, separator = (first, value) if isinstance(value, str) else (value, first)
        budget.spend(0, _size(items) * _size(separator))
    elif name == "replace" and len(arguments) > 1:
        budget.spend(0, (_size(value) // max(1, _size(first)) + 1) * _size(arguments[1]))
    elif name == "indent" and isinstance(first, str):
        budget.spend(0, (str(value).count("\n") + 1) * len(first))
    elif name in ("format", "format_map"):
        if WIDE.search(str(value)):
            raise TooMuch("it formats to a width of more than 99,999 characters")
        for argument in arguments:
            budget.deep(argument)
        budget.spend(0, (str(value).count("{") + str(value).count("%")) * max(map(_size, arguments)))


def _size(value: object) -> int:
    return len(value) if isinstance(value, str | bytes | list | tuple | dict | set) else 1
