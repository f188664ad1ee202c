"""Print a script that completes verbs, flags and, for verbs with overrides, config groups with their options.

The Tab key starts no Python: the script holds all words. bash and zsh take it anew in each shell; the file
for fish is to be written again after an upgrade.

examples:
  bash    echo 'eval "$(mft completion bash)"' >> ~/.bashrc
  zsh     echo 'eval "$(mft completion zsh)"' >> ~/.zshrc          below compinit
  fish    mft completion fish > ~/.config/fish/completions/mft.fish
"""

from __future__ import annotations

import importlib
import pkgutil
import shlex
from collections.abc import Sequence

from mft import commands
from mft.commands.arguments import Parser, action_of

# Written by hand, not by a package: `peft=lora` is one word for mft and three for bash, which shtab does not
# join again, and argcomplete would start Python at every Tab.
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


CASES = {"bash": "        {verb}) words='{words}' ;;", "zsh": "        {verb}) offered=({words}) ;;"}
"""The line of a verb in a script; fish takes a line for each word."""


def parser() -> Parser:
    """Returns the command line of `mft completion`."""
    return Parser("completion", "bash|zsh|fish", __doc__, actions=("bash", "zsh", "fish"))


def command(arguments: Sequence[str]) -> None:
    """Prints the script of a shell."""
    line = parser()
    shell, _ = action_of(line, line.parse(arguments or ["--help"]).words)
    names = [module.name for module in pkgutil.iter_modules(commands.__path__)]
    modules = {name: importlib.import_module(f"{commands.__name__}.{name}") for name in names}
    parsers = [module.parser() for module in modules.values() if hasattr(module, "parser")]
    lines = {line.prog.removeprefix("mft "): line for line in parsers}
    if shell == "fish":  # it has descriptions, and needs no function that looks at the line
        print(fish(lines))
        return
    cases = [CASES[shell].format(verb=verb, words=" ".join(offered(verb, lines[verb]))) for verb in lines]
    template = BASH if shell == "bash" else ZSH
    print(template.format(verbs=" ".join(lines), cases="\n".join(cases)), end="")


def offered(verb: str, line: Parser) -> list[str]:
    """Returns the words that are offered behind a verb."""
    from mft.commands.train import group_table

    # Options of conf/ alone: no folder of --config-dir is known when the script is written.
    groups = group_table() if verb in ("train", "plan", "data", "verify-resume") else {}
    choices = [f"{group}={option}" for group, options in groups.items() for option in options]
    return [*line.actions, *(flag for flag in line.flags if flag.startswith("--")), *choices]


def fish(lines: dict[str, Parser]) -> str:
    """Returns the script for fish, which shows what a flag is for."""
    written = []
    for verb, line in lines.items():
        story = shlex.quote((line.description or "").split("\n")[0])
        written.append(f"complete -c mft -n __fish_use_subcommand -a {verb} -d {story}")
        seen = f"complete -c mft -n '__fish_seen_subcommand_from {verb}'"
        for word in offered(verb, line):
            if word.startswith("--"):
                meaning = (line.flags[word].help or "").replace("%%", "%")
                written.append(f"{seen} -l {word[2:]} -d {shlex.quote(meaning)}")
            else:
                written.append(f"{seen} -a {shlex.quote(word)}")
    return "\n".join(written)
