"""Answers to train.prompts while the model is divided over two ranks: those of one process."""

from __future__ import annotations

import json

import pytest

from tests.distributed.equality import differences, play_beside_single
from tests.distributed.runs import LAYOUTS, Tree
from tests.selection import long, selected

PAIRS = [("zero3", "full"), ("fsdp", "qlora"), long("zero3", "qlora"), long("fsdp", "full")]


@pytest.fixture(scope="module")
def tree(tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest) -> Tree:
    tree = Tree(tmp_path_factory.mktemp("answers"))
    prompts = tree.root / "prompts.jsonl"
    asked = ["return value", "names for import in range and some more words to be padded to"]
    rows = [{"data_name": "left", "chat_rounds": [{"role": "human", "content": words}]} for words in asked]
    prompts.write_text("".join(json.dumps(row) + "\n" for row in rows))
    asking = (
        f"train.prompts={prompts}",
        "train.prompts_max_new_tokens=5",
        "train.max_steps=3",
        *LAYOUTS["pack"],
    )
    backends: dict[str, list[str]] = {}
    for backend, peft in sorted(selected(request, "backend", "peft")):
        backends.setdefault(peft, []).append(backend)
    cases = {peft: (*asking, f"peft={peft}", "train.eval_every=3") for peft in backends}
    play_beside_single(tree, cases, backends)
    return tree


@pytest.mark.slow
@pytest.mark.dist
@pytest.mark.parametrize(("backend", "peft"), PAIRS)
def test_a_divided_model_answers_as_a_whole_one(tree: Tree, backend: str, peft: str) -> None:
    one, two = tree.folder("single", peft), tree.folder(backend, peft)
    expected = (one / "report" / "answers.md").read_text()
    assert expected.count("**before**") == expected.count("**after**") == 2
    assert (two / "report" / "answers.md").read_text() == expected
    assert max(differences(one, two).values()) < 1e-5  # asking left nothing behind
