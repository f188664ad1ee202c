"""The parser that all verbs share: flags, words, the former spelling, and mistakes as sentences."""

from __future__ import annotations

import importlib
from pathlib import Path

import pytest

from mft.cli import COMMANDS, HELP
from mft.commands import generate, sweep, train
from mft.commands.arguments import (
    BOOLEAN,
    COUNT,
    FOLDER,
    HelpPrinted,
    Parser,
    action_of,
    one_of,
    overrides_in,
)
from mft.errors import UserError


@pytest.fixture
def line() -> Parser:
    line = Parser("paint", "WALL …", "Paint walls.", actions=("walls", "doors"))
    line.switch("-d", "--dry-run", help="mix the colour and stop")
    line.option("--coats", COUNT, "how often", 2, formerly=True)
    line.option("--top-coat", BOOLEAN, "varnish it", False, formerly=True)
    line.option("--colour", one_of("NAME", "red", "green"), "of the paint")
    line.option("--tool", FOLDER, "where a brush is", action="append")
    return line


def refusal(line: Parser, *words: str) -> str:
    with pytest.raises(UserError) as caught:
        line.parse(words)
    return str(caught.value)


def test_flags_and_words_in_any_order(line: Parser) -> None:
    parsed = line.parse(
        ["north", "--coats=3", "-d", "south", "--tool", "a", "--colour", "green", "--tool", "b"]
    )
    assert (parsed.words, parsed.coats, parsed.dry_run, parsed.colour) == (
        ["north", "south"],
        3,
        True,
        "green",
    )
    assert parsed.tool == [Path("a"), Path("b")] and parsed.top_coat is False
    assert line.parse([]).words == [] and line.parse([]).coats == 2
    assert line.parse(["-1", "-", "- a list"]).words == ["-1", "-", "- a list"]
    assert line.parse(["--top_coat", "TRUE"]).top_coat is True, "underscores as in a config"


def test_words_behind_two_dashes_are_taken_as_they_are(line: Parser) -> None:
    parsed = line.parse(["a", "--coats", "3", "--", "--coats", "coats=4", "--help", "--"])
    assert parsed.words == ["a", "--coats", "coats=4", "--help", "--"] and parsed.coats == 3


def test_the_former_spelling_is_understood_with_a_note(line: Parser, capsys) -> None:
    parsed = line.parse(["a", "coats=4", "top_coat=true"])
    assert (parsed.words, parsed.coats, parsed.top_coat) == (["a"], 4, True)
    note = capsys.readouterr().err
    assert (
        "coats=4 top_coat=true" in note
        and "write --coats=4 --top-coat=true" in note
        and note.count("\n") == 1
    )
    assert line.parse(["coats=4", "coats=5", "coats=4"]).coats == 4, "the last word wins"
    assert refusal(line, "coat=4").startswith("'coat=4': unknown option; did you mean --coats?")
    assert "--coats needs a whole number from 1, got 'no'" in refusal(line, "coats=no")
    assert line.parse(["colour=red"]).words == ["colour=red"], "was never spelled so"
    assert line.parse(["--colour", "red", "x=5"]).words == ["x=5"]


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["--coat", "3"], "mft paint has no flag --coat; did you mean --coats? Flags: --help, --dry-run"),
        (["---"], "mft paint has no flag ---. Flags: --help, --dry-run"),
        (["--coats"], "--coats needs a whole number from 1."),
        (["--coats", "0"], "--coats needs a whole number from 1, got '0'."),
        (["--colour=gren"], "--colour needs one of red, green, got 'gren'; did you mean green?"),
        (["--top-coat", "maybe"], "--top-coat needs true or false, got 'maybe'."),
        (["--dry-run=yes"], "--dry-run takes no value, got 'yes'."),
        (["--tool", "--dry-run"], "--tool needs a folder."),
        (["-x"], "mft paint has no flag -x"),
    ],
)
def test_mistakes_are_sentences(line: Parser, words: list[str], sentence: str) -> None:
    assert refusal(line, *words).startswith(sentence)


def test_help_explains_every_flag_with_its_default(line: Parser, capsys) -> None:
    with pytest.raises(HelpPrinted):
        line.parse(["north", "--help"])
    said = capsys.readouterr().out
    assert "usage: mft paint WALL …" in said and "how often (default: 2)" in said
    assert "varnish it (default: false)" in said and "of the paint: one of red, green" in said
    assert all(" ".join(action.help.split()) for action in line.flags.values())


def test_subcommands(line: Parser) -> None:
    assert action_of(line, ["doors", "a"]) == ("doors", ["a"])
    for words, part in (
        (["dors"], "'dors'; did you mean doors? Subcommands: walls, doors."),
        ([], "needs a subcommand"),
    ):
        with pytest.raises(UserError, match="mft paint") as caught:
            action_of(line, words)
        assert part in str(caught.value)


def test_the_table_of_verbs_is_what_the_folder_holds() -> None:
    modules = {name: importlib.import_module(target.partition(":")[0]) for name, target in COMMANDS.items()}
    files = {path.stem.replace("_", "-") for path in Path(train.__file__).parent.glob("[a-z]*.py")}
    assert set(COMMANDS) == files - {"arguments", "trained-model"}
    assert all(callable(module.command) for module in modules.values())
    assert all(f"mft {verb}" in HELP for verb in COMMANDS)
    verbs = {name: module.parser() for name, module in modules.items()}
    assert all(action.help for line in verbs.values() for action in line.flags.values()), (
        "a flag is not explained"
    )
    assert all(line.prog == f"mft {verb}" for verb, line in verbs.items())


def test_a_prompt_is_a_prompt() -> None:
    words = ["run", "x=5", "--temperature", "0.5", "solve x = 5", "--", "--help", "seed=1"]
    parsed = generate.parser().parse(words)
    assert parsed.words == ["run", "x=5", "solve x = 5", "--help", "seed=1"] and parsed.temperature == 0.5
    assert parsed.seed == 0 and parsed.do_sample is True


def test_train_keeps_the_flags_of_hydra() -> None:
    words = [
        "experiment=demo",
        "-m",
        "-cd",
        "a",
        "--config-dir=b",
        "~tracking",
        "--cfg",
        "job",
        "--resolve",
        "-p=train",
    ]
    parsed = train.parser().parse(words)
    assert overrides_in(parsed.words) == ["experiment=demo", "~tracking"]
    assert parsed.config_dir == [Path("a"), Path("b")] and not parsed.dry_run
    with pytest.raises(UserError, match="--cfg=job shows one run: leave out -m"):
        train.hydra_flags(parsed)
    parsed.multirun = False
    assert train.hydra_flags(parsed) == ["--cfg=job", "--resolve", "--package=train"]
    assert train.hydra_flags(train.parser().parse(["--info"])) == ["--info=all"]
    with pytest.raises(UserError, match=r"--package=train needs --cfg job"):
        train.hydra_flags(train.parser().parse(["--package", "train"]))
    with pytest.raises(UserError, match="'lora' is not a valid override; did you mean peft=lora"):
        overrides_in(["lora"])


def test_a_sweep_is_resumed_by_its_folder(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"is not a sweep: it has no sweep\.json"):
        sweep.command(["resume", str(tmp_path)])
    with pytest.raises(UserError, match=r"is not a sweep: it has no sweep\.json"):
        sweep.command([str(tmp_path), "--dry-run"])
    with pytest.raises(UserError, match="unknown subcommand 'resme'; did you mean resume"):
        sweep.command(["resme", str(tmp_path)])
