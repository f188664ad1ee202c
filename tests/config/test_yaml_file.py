"""Yaml that anybody may have written: bounded time, and a sentence with file and line."""

from __future__ import annotations

import time
from pathlib import Path

import pytest

from mft import cli
from mft.config.compose import compose_resolved
from mft.config.schema import load
from mft.errors import UserError
from mft.runs.folders import read_run

LAUGHS = "a0: &a0 [x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]\n" for i in range(1, 12)
)
MERGES = "m0: &m0 {a: 1}\n" + "".join(
    f"m{i}: &m{i} {{<<: [{', '.join([f'*m{i - 1}'] * 9)}]}}\n" for i in range(1, 12)
)


@pytest.mark.parametrize(
    "text, part",
    [
        (LAUGHS, "values"),
        (MERGES, "values"),
        ("name: " + "[" * 5000, ":2: more than 64"),
        ("name: " + "{a: " * 5000, ":2: more than 64"),
        ("".join(f"{' ' * i}a:\n" for i in range(900)), "more than 64"),
        ("name: &a [*a]\n", ":2: *a stands inside"),
        ("name: &a {b: {c: *a}}\n", ":2: *a stands inside"),
        ("name: *nowhere\n", "not valid YAML"),
        ("train:\n  seed: " + "9" * 5000, ":3: a number of 5,000"),
        ("train:\n  seed: 0x" + "f" * 20000, ":3: a number of"),
        ("train:\n  seed: 1" + ":59" * 20000, ":3: a number of"),
        ("name: a\nname: b\n", ":3: not valid YAML: found duplicate key"),
        ("train:\n\tseed: 1\n", ":3: not valid YAML"),
        ("name: !!python/object/apply:os.system [touch x]\n", "the tag"),
        ("name: !!int abc\n", "the tag"),
        ("name: a\n\u0000", "not valid YAML"),
        ("defaults: lora\n", "defaults: expected a list"),
        ("defaults: {a: b}\n", "defaults: expected a list"),
        ("defaults:\n  - it\n", "it.yaml: its defaults lead back to itself"),
        ("defaults:\n  - other\n", "its defaults lead back to itself"),
        ("name: x\n" + "# " + "x" * 2**20, "larger than"),
    ],
)
def test_a_yaml_is_judged_before_it_is_loaded(text: str, part: str, tmp_path: Path) -> None:
    (tmp_path / "experiment").mkdir()
    (tmp_path / "experiment" / "it.yaml").write_text(f"# @package _global_\n{text}", encoding="utf-8")
    (tmp_path / "experiment" / "other.yaml").write_text("# @package _global_\ndefaults: [it]\n")
    begin = time.monotonic()
    with pytest.raises(UserError) as caught:
        compose_resolved(["model=tiny", "experiment=it"], [tmp_path])
    assert part in str(caught.value) and str(tmp_path / "experiment") in str(caught.value), str(caught.value)
    assert len(str(caught.value)) < 500 and time.monotonic() - begin < 30


def test_a_yaml_that_is_not_utf8_names_the_line_and_a_bom_is_fine(tmp_path: Path) -> None:
    (tmp_path / "experiment").mkdir()
    file = tmp_path / "experiment" / "it.yaml"
    file.write_bytes(b"# @package _global_\nname: caf\xe9\n")
    with pytest.raises(UserError, match=r"it\.yaml:2: is not UTF-8 \(byte 0xe9\)"):
        compose_resolved(["experiment=it"], [tmp_path])


def test_anchors_as_people_use_them_are_fine(tmp_path: Path) -> None:
    (tmp_path / "experiment").mkdir()
    text = "# @package _global_\ndata: {paths: [&a /x/one, *a]}\nname: &n it\nsweep: *n\n"
    (tmp_path / "experiment" / "it.yaml").write_text(text)
    assert compose_resolved(["experiment=it"], [tmp_path]).data.paths == ["/x/one", "/x/one"]


@pytest.mark.parametrize("text", [LAUGHS, "name: &a [*a]\n", "name: " + "[" * 5000])
def test_the_config_of_a_run_folder_is_judged_too(text: str, tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text(text)
    with pytest.raises(UserError, match=r"config\.yaml"):
        load(tmp_path)
    assert read_run(tmp_path).values == {}, "a list of runs has the others"


TASK = "+task.x={_target_: mft.data.task.Task, %s}"


@pytest.mark.parametrize(
    "overrides, part",
    [
        (["name=${sweep}", "sweep=${name}"], "leads back to itself (name → sweep → name)"),
        (["name=${name}"], "leads back to itself"),
        (["+task.x.a=${task}"], "leads back to itself"),
        (
            [f"+task.x.a{i}=${{task.x.a{i + 1}}}${{task.x.a{i + 1}}}" for i in range(40)] + ["+task.x.a40=x"],
            "million",
        ),
        (
            [f"+task.x.a{i}=[${{..a{i + 1}}},${{..a{i + 1}}}]" for i in range(40)] + ["+task.x.a40=x"],
            "million",
        ),
        (
            [
                f"+task.x.a{i}='${{oc.select:task.x.a{i + 1}}}${{oc.select:task.x.a{i + 1}}}'"
                for i in range(40)
            ]
            + ["+task.x.a40=x"],
            "million",
        ),
        ([f"name={'[' * 500}{']' * 500}"], "too many brackets"),
        (["name=" + "{a:" * 500 + "1" + "}" * 500], "too many brackets"),
    ],
)
def test_interpolations_and_brackets_are_bounded(overrides: list[str], part: str) -> None:
    begin = time.monotonic()
    with pytest.raises(UserError) as caught:
        compose_resolved(["model=tiny", *overrides])
    assert part in str(caught.value), str(caught.value)[:500]
    assert time.monotonic() - begin < 30


def test_control_characters_of_an_error_are_shown_not_obeyed(capsys) -> None:
    with pytest.raises(SystemExit):
        cli.fail("task \x1b]52;c;ZXZpbA==\x07 and \x9b2J, \u202eabc, tab\tand\nline")
    assert capsys.readouterr().err == (
        "mft: task \\x1b]52;c;ZXZpbA==\\x07 and \\x9b2J, \\u202eabc, tab\tand\nline\n"
    )
