"""The tasks cut from library source: deterministic, well-formed, and answers that complete their prompts."""

from __future__ import annotations

import ast
import doctest
import json
import os
import re
import subprocess
import sys
import unittest
from collections import Counter
from pathlib import Path

import pytest

from mft.demo import source, tasks

ROOT = source.stdlib_root()
MODULES = "base64 calendar copy fractions heapq posixpath random shlex statistics string textwrap"
FILES = [ROOT / f"{module}.py" for module in MODULES.split()]
TESTS = [path for module in MODULES.split() if (path := ROOT / "test" / f"test_{module}.py").is_file()]
FENCED = re.compile(r"```python\n(.*?)\n```", re.DOTALL)


@pytest.fixture(scope="module")
def built():
    return tasks.build(FILES, TESTS, ROOT)


def turns(row: dict) -> tuple[str, str]:
    return row["chat_rounds"][-2]["content"], row["chat_rounds"][-1]["content"]


def prompt_code(row: dict) -> str:
    return FENCED.search(turns(row)[0])[1]


def test_the_same_in_every_process():
    """Python's string hashes differ from process to process; the rows must not."""
    command = (
        "import hashlib, json\nfrom tests.demo.test_tasks import FILES, ROOT, TESTS\nfrom mft.demo import "
        "tasks\n"
        "print(hashlib.sha256(json.dumps(tasks.build(FILES[:4], TESTS[:4], ROOT)).encode()).hexdigest())"
    )
    home = Path(__file__).parents[2]
    digests = {
        subprocess.run(
            [sys.executable, "-c", command],
            cwd=home,
            env=os.environ | {"PYTHONHASHSEED": seed, "PYTHONPATH": str(home)},
            capture_output=True,
            text=True,
            check=True,
            timeout=300,
        ).stdout
        for seed in ("1", "2")
    }
    assert len(digests) == 1


def test_rows_are_well_formed_chats(built):
    rows, examples, left_out = built
    assert set(rows) == set(tasks.CAPS)
    everything = [row for task in rows for row in rows[task]] + examples
    assert len({row["id"] for row in everything}) == len(everything) > 150
    for row in everything:
        roles = [message["role"] for message in row["chat_rounds"]]
        assert roles == ["human", "bot"]
        assert all(message["content"].strip() for message in row["chat_rounds"])
        assert tasks.characters(row) <= tasks.MAX_CHARACTERS
        json.dumps(row)
    assert all(count > 0 for count in left_out.values())


def test_a_function_serves_one_task(built):
    rows, examples, _ = built
    homes: dict[str, set[str]] = {}
    for task in ("completion", "docstring", "function_body", "function_name"):
        for row in rows[task]:
            homes.setdefault(row["source"], set()).add(task)
    assert all(len(tasks_of) == 1 for tasks_of in homes.values())
    held_out = {row["source"] for row in examples}
    assert len(examples) == len(tasks.CAPS)
    assert not held_out & {row["source"] for of_task in rows.values() for row in of_task}


def test_prompt_and_answer_make_a_function(built):
    rows, _, _ = built
    for row in rows["function_body"] + rows["completion"]:
        ast.parse(prompt_code(row) + "\n" + turns(row)[1])
        assert not prompt_code(row).splitlines()[-1].lstrip().startswith("@")
    for row in rows["docstring"]:
        (node,) = ast.parse(prompt_code(row)).body
        assert ast.get_docstring(node) is None
        assert turns(row)[1] not in turns(row)[0]


def test_the_name_is_masked(built):
    for row in built[0]["function_name"]:
        human, name = turns(row)
        assert name.isidentifier() and not re.search(rf"\b{name}\b", prompt_code(row))
        (node,) = ast.parse(prompt_code(row)).body
        assert node.name == tasks.MASK and tasks.MASK in human


def test_unit_tests_stand_alone_and_pass(built):
    """Runs every test with modules of the standard library, and nothing else."""
    rows = [row for row in built[0]["unit_test"] if not row["id"].endswith(":doctest")]
    if not TESTS:
        pytest.skip("this Python comes without Lib/test")
    assert len(rows) > 30
    suite = unittest.TestSuite()
    for row in rows:
        answer = turns(row)[1]
        if owner := re.search(r" for this method of `(?:\w+\.)*(\w+)`", turns(row)[0]):
            assert owner[1] in answer, row["id"]
        names = {node.id for node in ast.walk(ast.parse(answer)) if isinstance(node, ast.Name)}
        space = {name: __import__(name) for name in {"unittest", *(sys.stdlib_module_names & names)}}
        exec(
            "class Case(unittest.TestCase):\n" + "".join(f"    {line}\n" for line in answer.split("\n")),
            space,
        )
        suite.addTest(space["Case"](row["id"].rsplit(":", 1)[1]))
    result = unittest.TestResult()
    suite.run(result)
    assert result.testsRun == len(rows)
    assert not result.failures and not result.errors


def test_without_lib_test_there_are_doctests():
    rows, _, _ = tasks.build(FILES, [], ROOT)
    assert rows["unit_test"]
    for row in rows["unit_test"]:
        assert len(doctest.DocTestParser().get_examples(turns(row)[1])) >= 2


def test_odd_files_are_left_out_and_counted(tmp_path: Path):
    body = '    """Adds the numbers and tells the log about it."""\n    total = a + b\n    print("the sum is", total)\n'
    sound = f"def add(a, b):\n{body}    return total, 'a line that makes this long enough'\n"
    (tmp_path / "sound.py").write_text(sound)
    (tmp_path / "twin.py").write_text(sound.replace("def add", "def plus").replace("Adds", "Sums"))
    (tmp_path / "broken.py").write_text("def f(:\n")
    (tmp_path / "latin.py").write_bytes("# é\n".encode("latin-1") + sound.encode())
    (tmp_path / "tabs.py").write_text(sound.replace("    ", "\t").replace("total", "amount"))
    (tmp_path / "accents.py").write_text(sound.replace("the sum", "la somme réelle"), encoding="utf-8")
    (tmp_path / "string.py").write_text(
        "class A:\n    def f(self):\n        self.text = '''\nat the margin'''\n"
    )
    left_out: Counter[str] = Counter()
    found = source.functions(sorted(tmp_path.glob("*.py")), tmp_path, left_out)
    assert [function.path for function in found] == ["sound.add"]
    assert left_out == {
        "file does not parse": 2,
        "same body as another function": 1,
        "too long, or with tabs, form feeds or characters beyond ASCII": 2,
        "does not stand alone": 1,
    }
    assert found[0].head + "\n" + found[0].body == found[0].code
    assert found[0].doc == "Adds the numbers and tells the log about it."


def test_a_decorator_stays_with_its_function(tmp_path: Path):
    body = "    @wraps(function)\n    def inner(*arguments):\n        return function(*arguments, 'long enough')\n"
    (tmp_path / "outer.py").write_text(f"def outer(function):\n{body}    return inner\n")
    (found,) = source.functions([tmp_path / "outer.py"], tmp_path, Counter())
    assert found.head == "def outer(function):" and found.body == f"{body}    return inner"


def test_where_the_library_ends(tmp_path: Path):
    for name in (
        "a.py",
        "json/__init__.py",
        "site-packages/b.py",
        "idlelib/c.py",
        "test/test_a.py",
        "json/test/d.py",
    ):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    files = source.stdlib_files(tmp_path)
    assert files == [tmp_path / "a.py", tmp_path / "json/__init__.py"]
    assert source.test_files(tmp_path) == [tmp_path / "test/test_a.py"]
