"""Chat templates from outside end in bounded time and memory, and render as they do in transformers' own
sandbox."""

import copy
import resource
import time

import pytest
from jinja2.sandbox import ImmutableSandboxedEnvironment
from transformers.utils import chat_template_utils

from mft.batch import Message
from mft.data.sandbox import Bounded, bound
from mft.data.template import OWN
from mft.data.template_choice import named
from mft.errors import UserError
from tests.data.conftest import CHATML

DOUBLED = (
    "{% set ns = namespace(x=START) %}{% for i in range(60) %}{% set ns.x = NEXT %}{% endfor %}{{ ns.x }}"
)
BOMBS = {
    "range": "{% for i in range(10**9) %}x{% endfor %}",
    "nested loops": "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}",
    "loops of text": "{% for i in range(99999) %}" + "x" * 9999 + "{% endfor %}",
    "recursion": "{% macro f(n) %}{{ f(n) }}{% endmacro %}{{ f(1) }}",
    "a tree of calls": "{% macro f(n) %}{% if n %}{{ f(n - 1) }}{{ f(n - 1) }}{% endif %}{% endmacro %}{{ f(60) }}",
    "a recursive loop": "{% for i in [1] recursive %}{{ loop([1, 1]) }}{% endfor %}",
    "repeated text": "{{ 'a' * 10**10 }}",
    "a repeated list": "{{ [1] * 10**10 }}",
    "a constant": "{{ 'x' * 999999999 }}",
    "a power": "{{ 10 ** (10 ** 10) }}",
    "powers": "{% set ns = namespace(x=9) %}{% for i in range(60) %}{% set ns.x = ns.x ** 9 %}{% endfor %}",
    "doubled by ~": DOUBLED.replace("START", "'ab'").replace("NEXT", "ns.x ~ ns.x"),
    "doubled by +": DOUBLED.replace("START", "'ab'").replace("NEXT", "ns.x + ns.x"),
    "doubled by join": DOUBLED.replace("START", "'ab'").replace("NEXT", "[ns.x, ns.x] | join"),
    "doubled by replace": DOUBLED.replace("START", "'aa'").replace("NEXT", "ns.x.replace('a', ns.x)"),
    "doubled by format": DOUBLED.replace("START", "'ab'").replace("NEXT", "'%s%s' % (ns.x, ns.x)"),
    "doubled lists": DOUBLED.replace("START", "['a']").replace("NEXT", "[ns.x, ns.x]"),
    "doubled lists as JSON": DOUBLED.replace("START", "['a']")
    .replace("NEXT", "[ns.x, ns.x]")
    .replace("}}", "| tojson }}"),
    "doubled block": "{% set x %}abcdefgh{% endset %}" + "{% set x %}{{ x }}{{ x }}{% endset %}" * 60,
    "a width": "{{ 'a'.ljust(10**9) }}",
    "a width by filter": "{{ 'a' | center(1000000000) }}",
    "a width by format": "{{ '%999999999d' % 1 }}",
    "a width given to format": "{{ '{:{w}}'.format(1, w=10**9) }}",
    "a width by str.format": "{{ '{:999999999}'.format(1) }}",
    "an indent": "{{ [[1]] | tojson(indent=10**9) }}",
    "words": "{{ lipsum(n=100000) }}",
    "groups": "{{ range(9) | batch(10**9, 'x') | list }}",
    "deep source": "{{ " + "(" * 9999 + "1" + ")" * 9999 + " }}",
    "many ifs": "{% if 1 %}" * 999 + "{% endif %}" * 999,
    "long source": "{# " + "x" * 300_000 + " #}",
    "division": "{{ 1 / 0 }}",
}


@pytest.mark.parametrize("name", BOMBS)
def test_templates_that_run_or_grow_for_ever_are_one_sentence(kinds, name):
    tokenizer = copy.deepcopy(kinds["bytes"])
    tokenizer.chat_template = BOMBS[name] + CHATML.replace("{{ bos_token }}", "")
    before, start = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.perf_counter()
    with pytest.raises(UserError, match=r"data\.template=tokenizer") as raised:
        named(OWN, None, tokenizer)
    assert time.perf_counter() - start < 20
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 1 << 20  # KiB
    assert len(str(raised.value)) < 400 and "\n" not in str(raised.value)


def test_a_template_that_grows_with_some_rows_only_ends_the_run_there(kinds):
    tokenizer = copy.deepcopy(kinds["bytes"])
    bomb = "{% if messages[0].content == 'boo' %}" + BOMBS["nested loops"] + "{% endif %}"
    tokenizer.chat_template = bomb + CHATML.replace("{{ bos_token }}", "")
    template = named(OWN, None, tokenizer)
    assert template.segments([Message("user", "q"), Message("assistant", "a")])
    with pytest.raises(UserError, match="takes more than 1,000,000 passes"):
        template.segments([Message("user", "boo"), Message("assistant", "a")])


TEMPLATES = {
    "chatml": CHATML,
    "qwen": (
        "{%- set ns = namespace(multi=true, last=messages|length - 1) %}{%- for message in messages[::-1] %}"
        "{%- set index = (messages|length - 1) - loop.index0 %}"
        "{%- if ns.multi and message.role == 'user' and not(message.content.startswith('<t>')) %}"
        "{%- set ns.multi = false %}{%- set ns.last = index %}{%- endif %}{%- endfor %}"
        "{%- for message in messages %}{%- set content = message.content if message.content is string else "
        "'' %}"
        "{%- if message.role == 'assistant' %}{%- if '</think>' in content %}"
        "{%- set content = content.split('</think>')[-1].lstrip('\\n') %}{%- endif %}"
        "{{- '<|im_start|>' + message.role + '\\n<think>\\n' + ''|trim + '\\n</think>\\n\\n' + "
        "content~'<|im_end|>' }}"
        "{%- else %}{{- '<|im_start|>' ~ message.role ~ loop.index ~ loop.last ~ '\\n' ~ content + "
        "'<|im_end|>\\n' }}"
        "{%- endif %}{%- endfor %}{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{%- "
        "endif %}"
    ),
    "many words": (
        "{% macro turn(role, text='x') -%}[{{ role | upper }}: {{ caller() if caller else text }}]{%- "
        "endmacro %}"
        "{% for m in messages if m.role != 'system' recursive %}{{ turn(m['role'], m.content | trim) }}"
        "{{ m.content | replace('a', 'b') }}"
        "{{ loop.length }}{{ loop.previtem.role if loop.previtem is defined }}{{ loop.cycle('odd', 'even') }}"
        "{% if loop.index > 3 %}{% break %}{% endif %}{% else %}none{% endfor %}"
        "{% call turn('system') %}{{ messages | map(attribute='role') | unique | join(', ') }}{% endcall %}"
        "{% filter upper %}{{ messages[0] | tojson(indent=2) }}{% endfilter %}{{ '%s-%05.1f' % ('a', 2 / "
        "3) }}"
        "{{ '{:>4}'.format(7) }}{{ missing }}{{ missing | default('none') }}{{ none }}{{ 7 // 2 * 3 }}"
        "{{ [1, 'a'] + [none] }}{% set x %}{{ 2 ** 5 }}{% endset %}{{ x ~ 1.50 ~ true }}"
        "{{ dict(a=1) | items | list }}{{ bos_token }}"
        "{{ range(3) | sum }}"
        "{% generation %}{{ messages | selectattr('role', 'equalto', 'user') | list | length }}{% "
        "endgeneration %}"
        "{% for k, v in {'a': {'b': [1]}}.items() %}{{ k }}{{ v }}{{ v.b | first }}{% endfor %}{{ 'x' if x "
        "else 'y' }}"
    ),
}


@pytest.mark.parametrize("name", TEMPLATES)
def test_other_templates_render_as_in_the_sandbox_of_transformers(kinds, name, monkeypatch):
    tokenizer = copy.deepcopy(kinds["metaspace"])
    turns = [
        {"role": role, "content": f" {role} <a> & '{i}'\n"}
        for i, role in enumerate(("system", "user", "assistant", "user", "assistant"))
    ]

    def rendered() -> list[str]:
        chat_template_utils._compile_jinja_template.cache_clear()
        return [
            tokenizer.apply_chat_template(
                turns[:n], chat_template=TEMPLATES[name], tokenize=False, add_generation_prompt=bool(n % 2)
            )
            for n in range(1, 6)
        ]

    monkeypatch.setattr(chat_template_utils, "ImmutableSandboxedEnvironment", ImmutableSandboxedEnvironment)
    theirs = rendered()
    bound()
    assert chat_template_utils.ImmutableSandboxedEnvironment is Bounded
    assert rendered() == theirs


def test_long_conversations_are_not_refused(kinds):
    tokenizer = copy.deepcopy(kinds["bytes"])
    tokenizer.chat_template = TEMPLATES["qwen"]
    bound()
    turns = [{"role": ("user", "assistant")[i % 2], "content": "word " * 2000} for i in range(2000)]
    text = tokenizer.apply_chat_template(turns, tokenize=False)
    assert len(text) > 20_000_000
