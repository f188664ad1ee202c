"""Every command in README.md, CONTRIBUTING.md and docs/ is one that the program has, and composes to a
config."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest
from hydra.core.override_parser.overrides_parser import OverridesParser
from omegaconf import OmegaConf

from mft.cli import COMMANDS, main
from mft.commands.arguments import overrides_in
from mft.commands.train import parser
from mft.config import plugins
from mft.config.build import build
from mft.config.compose import compose_resolved
from tests.tiny_runs import write_task

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
LAUNCHERS = ("torchrun", "accelerate", "srun")
SETUP = ("pip", "python3", "source", ".venv/bin/pre-commit")
"""They set a machine up; the one of CI is set up by the same packages through `make train`."""
PROGRAMS = ("mft", "make", "python", *LAUNCHERS, *SETUP)


def commands() -> list[tuple[str, list[str]]]:
    """Returns (page, words) of every whole command: lines of bash blocks, and inline code that begins with a
    program.

    Inline code that only names something (`mft`, `mft compare` without arguments) counts, too, where it is a
    command.
    """
    found = []
    for page in PAGES:
        text = page.read_text(encoding="utf-8").replace("\\\n", " ")
        blocks = re.findall(r"^```bash\n(.*?)^```", text, re.M | re.S)
        inline = re.findall(r"`([^`\n]+)`", re.sub(r"^```.*?^```", "", text, flags=re.M | re.S))
        for line in [line for block in blocks for line in block.splitlines()] + inline:
            for part in re.split(r"\s&&\s", re.sub(r"\s+# .*", "", line)):
                command = re.sub(r"^(?:[A-Z_]+=\S+ )+", "", part.strip())  # variables before it
                if command.partition(" ")[0] in PROGRAMS and " " in command:
                    found.append((page.name, shlex.split(command)))
    return found


def of_mft(words: list[str]) -> list[str]:
    """Returns the arguments of `mft`, also behind a launcher; none for other programs."""
    for start in (["mft"], ["-m", "mft.cli"]):
        for at in range(len(words) - len(start) + 1):
            if words[at : at + len(start)] == start and words[0] in ("mft", *LAUNCHERS):
                return words[at + len(start) :]
    return []


def first_of_sweep(override: str) -> str:
    """Returns an override with one value: the first one of those it sweeps over."""
    parsed = OverridesParser.create().parse_override(override)
    if not parsed.is_sweep_override():
        return override
    return f"{parsed.get_key_element()}={next(parsed.sweep_string_iterator())}"


ALL = commands()
TRAIN, DATA, OTHERS, PYTHON, MAKE = [], [], [], [], []
for page, words in ALL:
    arguments, about = of_mft(words), pytest.param(words, id=f"{page}: {' '.join(words)}")
    if arguments:
        kind = {"train": TRAIN, "data": DATA if arguments[1:] else OTHERS}.get(arguments[0], OTHERS)
    else:
        kind = {"python": PYTHON, "make": MAKE}.get(words[0])
    if kind is not None and not any(about.id == known.id for known in kind):
        kind.append(about)


def test_the_pages_hold_commands_of_every_kind() -> None:
    assert len(TRAIN) >= 10 and len(DATA) >= 3 and len(OTHERS) >= 10 and len(PYTHON) >= 5 and len(MAKE) >= 3
    assert not [words for _, words in ALL if "mft" in words[:1] and not of_mft(words)]


@pytest.mark.parametrize("words", TRAIN)
def test_training_commands_compose(words: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(ROOT / "examples" / "plugin")  # the package that docs/plugins.md names
    monkeypatch.setattr(plugins, "_named", {})
    given = [
        word.replace("…", "owner/name")
        for word in of_mft(words)[1:]
        if word not in ("…", "--dry-run", "--check")
    ]
    parsed = parser().parse(given)
    overrides, folders = overrides_in(parsed.words), parsed.config_dir or []
    # Launchers of other packages are for Hydra's own command line; tests/sweep/test_external_launcher.py
    # starts them.
    ours = [o for o in overrides if not o.startswith(("hydra/", "hydra."))]
    if parsed.multirun:
        ours = [first_of_sweep(override) for override in ours]
    cfg = compose_resolved(ours, folders)
    if OmegaConf.is_missing(cfg.model, "path"):  # as where … stands for it
        cfg.model.path = "owner/name"
    for component in ("model", "peft", "dist", "loss", "optimizer", "scheduler", "data.rows"):
        build(OmegaConf.select(cfg, component), component)


@pytest.mark.parametrize("words", DATA)
def test_data_commands_run(words: list[str], tmp_path: Path, cache_dir: Path, capsys) -> None:
    given = [word for word in words[2:] if "…" not in word]
    compose_resolved([word for word in given[1:] if word.startswith("experiment=")])
    paths = [str(write_task(tmp_path / name, 12)) for name in ("docstring", "naming")]
    tiny = [
        "debug=fast",
        f"data.paths=[{','.join(paths)}]",
        f"cache_dir={cache_dir}",
        f"output_dir={tmp_path / 'out'}",
    ]
    # `docstring` is a task of the demo in the docs, and the folder of that name here.
    arguments = [word for word in given if not word.startswith("experiment=") and word != "task=docstring"]
    main(["data", *arguments, *tiny])
    assert "docstring" in capsys.readouterr().out


@pytest.mark.parametrize("words", OTHERS)
def test_other_commands_and_their_options_are_known(words: list[str], capsys) -> None:
    name, *rest = of_mft(words)
    if name in ("--help", "--version"):
        main([name])
        return
    assert name in COMMANDS
    main([name, "--help"])
    said = capsys.readouterr().out
    options = [word.partition("=")[0] + "=" for word in rest if re.match(r"[\w.]+=", word)]
    options += [word for word in rest if word.startswith("--")]
    actions = [word for word in rest if word in ("resume", "sync")]
    assert not [option for option in options + actions if option not in said], said


@pytest.mark.parametrize("words", PYTHON)
def test_modules_are_there(words: list[str]) -> None:
    if "-m" not in words:
        assert (ROOT / words[1]).is_file()
        return
    module = ROOT.joinpath(*words[words.index("-m") + 1].split("."))
    assert module.with_suffix(".py").is_file() or (module / "__main__.py").is_file()


@pytest.mark.parametrize("words", MAKE)
def test_make_has_the_target(words: list[str]) -> None:
    assert re.search(rf"^{words[1]}:", (ROOT / "Makefile").read_text(encoding="utf-8"), re.M)


def test_what_a_page_says_is_held_by_a_test_is() -> None:
    named = [
        pair for page in PAGES for pair in re.findall(r"`(tests/[\w/]+\.py)::(\w+)`", page.read_text("utf-8"))
    ]
    assert len(named) > 30
    assert not [pair for pair in named if f"def {pair[1]}(" not in (ROOT / pair[0]).read_text("utf-8")]
