"""Which template `data.template` means: one of ours, the tokenizer's own chat template, or a file."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from mft.data.chat_template import Jinja, check_syntax
from mft.data.template import NOTE, OWN, MftCoder, Template
from mft.errors import UserError, nearest, nearest_sibling

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

TEMPLATES: dict[str, type[Template]] = {"mft": Template, "mftcoder": MftCoder}


def is_file(name: str) -> bool:
    """Whether `data.template` names a file."""
    return name.lower().endswith((".jinja", ".jinja2", ".j2"))


def check(name: str, role_markers: Mapping[str, object] | None = None) -> None:
    """Raises UserError where `data.template` is neither a template's name nor a file that is there, and for
    markers that it cannot take."""
    if name in TEMPLATES:
        TEMPLATES[name](role_markers)
        return
    if name != OWN and not is_file(name):
        names = (*TEMPLATES, OWN)
        allowed = f"{', '.join(names)}, or a file *.jinja{nearest(name, names)}"
        raise UserError(f"data.template: unknown template {name!r}; allowed: {allowed}")
    if is_file(name):
        check_syntax(_source(name), name)
    if role_markers:
        raise UserError(f"data.role_markers: has no effect with data.template={name}, which has its own")


def named(
    name: str,
    role_markers: Mapping[str, object] | None = None,
    tokenizer: PreTrainedTokenizerBase | None = None,
) -> Template:
    """Returns the template `data.template` asks for; raises UserError as `check` does.

    tokenizer: whose chat template `tokenizer` means, and which renders a file's.
    """
    check(name, role_markers)
    if name in TEMPLATES:
        return TEMPLATES[name](role_markers)
    assert tokenizer is not None, "a Jinja template is rendered by the tokenizer"
    if name == OWN:
        return of_tokenizer(tokenizer)
    return Jinja(_source(name), tokenizer, name)


def _source(name: str) -> str:
    path = Path(name).expanduser()
    if not path.is_file():
        raise UserError(f"data.template={name}: there is no such file{nearest_sibling(path) or '.'}")
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"data.template={name}: cannot be read as UTF-8 text: {error}.") from error


def of_tokenizer(tokenizer: PreTrainedTokenizerBase) -> Template:
    """Returns the template by which a saved tokenizer's model was trained, to encode prompts as in training.

    Raises UserError for a tokenizer without a chat template.
    """
    source = tokenizer.chat_template
    if isinstance(source, dict):  # some models bring one for tools, too
        source = source.get("default")
    if not source:
        others = ", ".join(TEMPLATES)
        problem = "the tokenizer has no chat template"
        raise UserError(f"data.template=tokenizer: {problem}; choose {others} or a file *.jinja")
    if source.startswith(NOTE):  # one of ours: its segments are known, with no need to render prefixes
        about = json.loads(source[len(NOTE) : source.index(" -#}")])
        template = TEMPLATES[about["template"]]()
        template.markers = about["role_markers"]
        return template
    return Jinja(source, tokenizer, OWN)


def adopt(tokenizer: PreTrainedTokenizerBase, template: Template) -> None:
    """Gives the tokenizer the template, to be saved with the model, and its end of turn as its EOS."""
    tokenizer.chat_template = template.jinja()
    template.give_end(tokenizer)
