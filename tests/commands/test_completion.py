"""The scripts for shells, asked in the shells themselves where they are installed."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

from mft import cli

SHELLS = ("bash", "zsh", "fish")

ASK = {
    "bash": """source {script}
COMP_LINE='{line}' COMP_POINT=${{#COMP_LINE}}
IFS=' ' read -ra COMP_WORDS <<< "${{COMP_LINE//=/ = }}"
COMP_CWORD=$(( ${{#COMP_WORDS[@]}} - 1 ))
_mft; printf '%s\\n' "${{COMPREPLY[@]}}" """,
    "fish": "source {script}; complete -C '{line}'",
}


@pytest.fixture
def scripts(tmp_path: Path, capsys) -> dict[str, Path]:
    found = {shell: tmp_path / f"mft.{shell}" for shell in SHELLS}
    for shell, path in found.items():
        cli.main(["completion", shell])
        path.write_text(capsys.readouterr().out)
    return found


@pytest.mark.parametrize("shell", SHELLS)
def test_the_script_holds_verbs_flags_and_options(shell: str, scripts: dict[str, Path]) -> None:
    text = scripts[shell].read_text()
    assert all(verb in text for verb in cli.COMMANDS)
    assert all(word in text for word in ("peft=lora", "loss=coba", "dry-run", "max-new-tokens", "group-by"))
    if shutil.which(shell):
        subprocess.run([shell, "-n", str(scripts[shell])], check=True, timeout=60)


@pytest.mark.parametrize("shell", ASK)
@pytest.mark.parametrize(
    ("line", "offered"),
    [
        ("mft mer", {"merge"}),
        ("mft train --dry", {"--dry-run"}),
        ("mft train model=tiny peft=q", {"peft=qlora"}),
        ("mft data sh", {"show"}),
        ("mft sweep re", {"resume"}),
        ("mft generate run --max", {"--max-new-tokens"}),
    ],
)
def test_what_the_shell_offers(
    shell: str, line: str, offered: set[str], scripts: dict[str, Path], tmp_path: Path
) -> None:
    if not shutil.which(shell):
        pytest.skip(f"{shell} is not installed")
    command = ASK[shell].format(script=scripts[shell], line=line)
    done = subprocess.run(
        [shell, "-c", command], capture_output=True, text=True, cwd=tmp_path, check=True, timeout=60
    )
    words = {line.split("\t")[0] for line in done.stdout.splitlines()}  # fish explains behind a tab
    if shell == "bash":  # which itself keeps what stands before the =
        offered = {word.rpartition("=")[2] for word in offered}
    assert words == offered, done.stdout + done.stderr


def test_a_mistaken_shell_is_named(capsys) -> None:
    with pytest.raises(SystemExit) as ended:
        cli.main(["completion", "fsh"])
    assert ended.value.code == 2 and "did you mean fish?" in capsys.readouterr().err
