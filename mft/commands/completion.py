"""`mft completion bash|zsh|fish`: a script that completes verbs, flags, and options of config groups.

The lists are written into the script when it is made, so that the Tab key starts no Python. They are made by
hand and not by a package: `peft=lora` is one word for mft and three for bash, which the generators of
completions (shtab, argcomplete) do not join again.
"""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Sequence

from mft import commands
from mft.commands.arguments import Parser, action_of

HOW = """\
  bash    echo 'eval "$(mft completion bash)"' >> ~/.bashrc
  zsh     echo 'eval "$(mft completion zsh)"' >> ~/.zshrc          below compinit
  fish    mft completion fish > ~/.config/fish/completions/mft.fish"""

BASH = """\
_mft() {{
    local line=${{COMP_LINE:0:COMP_POINT}} words reply
    local word=${{line##*[[:space:]]}}  # in one piece: for bash, = begins a new word
    if (( COMP_CWORD == 1 )); then words='{verbs}'; else case ${{COMP_WORDS[1]}} in
{cases}
    esac; fi
    mapfile -t COMPREPLY < <(compgen -W "$words" -- "$word")
    if [[ $word == *=* && $COMP_WORDBREAKS == *=* ]]; then  # bash replaces what follows the = alone
        COMPREPLY=("${{COMPREPLY[@]#"${{word%"${{word##*=}}"}}"}}")
    fi
}}
complete -o default -F _mft mft
"""

ZSH = """\
#compdef mft
_mft() {{
    local -a offered
    if (( CURRENT == 2 )); then offered=({verbs}); else case $words[2] in
{cases}
    esac; fi
    compadd -- $offered
    _files
}}
compdef _mft mft
"""


def parser() -> Parser:
    """Returns the command line of `mft completion`."""
    return Parser(
        "completion",
        "bash|zsh|fish",
        "Print a script that completes verbs, flags and, for train and data, config groups with their "
        "options.",
        HOW,
        actions=("bash", "zsh", "fish"),
    )


def command(arguments: Sequence[str]) -> None:
    """Prints the script of a shell."""
    line = parser()
    shell, _ = action_of(line, line.parse(arguments or ["--help"]).words)
    print({"bash": bash, "zsh": zsh, "fish": fish}[shell](parsers()), end="")


def parsers() -> dict[str, Parser]:
    """Returns the parser of every verb: of all modules of this folder that have one."""
    modules = [
        importlib.import_module(f"{commands.__name__}.{m.name}")
        for m in pkgutil.iter_modules(commands.__path__)
    ]
    return {
        module.__name__.rpartition(".")[2]: module.parser() for module in modules if hasattr(module, "parser")
    }


def offered(verb: str, line: Parser) -> list[str]:
    """Returns the words that are offered behind a verb."""
    from mft.commands.train import group_table

    groups = group_table() if verb in ("train", "data") else {}
    choices = [f"{group}={option}" for group, options in groups.items() for option in options]
    return [*line.actions, *(flag for flag in line.flags if flag.startswith("--")), *choices]


def bash(lines: dict[str, Parser]) -> str:
    """Returns the script for bash."""
    cases = [f"        {verb}) words='{' '.join(offered(verb, line))}' ;;" for verb, line in lines.items()]
    return BASH.format(verbs=" ".join(lines), cases="\n".join(cases))


def zsh(lines: dict[str, Parser]) -> str:
    """Returns the script for zsh."""
    cases = [f"        {verb}) offered=({' '.join(offered(verb, line))}) ;;" for verb, line in lines.items()]
    return ZSH.format(verbs=" ".join(lines), cases="\n".join(cases))


def fish(lines: dict[str, Parser]) -> str:
    """Returns the script for fish, which shows what a flag is for."""
    written = []
    for verb, line in lines.items():
        story = (line.description or "").split("\n")[0]
        written.append(f"complete -c mft -n __fish_use_subcommand -a {verb} -d {_quoted(story)}")
        seen = f"complete -c mft -n '__fish_seen_subcommand_from {verb}'"
        for flag, action in line.flags.items():
            if flag.startswith("--"):
                written.append(f"{seen} -l {flag[2:]} -d {_quoted((action.help or '').replace('%%', '%'))}")
        words = [word for word in offered(verb, line) if not word.startswith("--")]
        written += [f"{seen} -a {_quoted(' '.join(words))}"] if words else []
    return "\n".join(written) + "\n"


def _quoted(text: str) -> str:
    return "'" + text.replace("\\", "\\\\").replace("'", "\\'") + "'"
