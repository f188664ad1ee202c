"""Answer prompts with a run's model, encoded as in training. RUN: a run, checkpoint or model folder.

examples:
  mft generate outputs/demo/… "Write a function that reverses a list."
  mft generate outputs/demo/… --do-sample false --max-new-tokens 64 "def quick_sort(" "def merge_sort("
  mft generate outputs/demo/… -- "--help"                   after -- every word is a prompt
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

from mft.commands.arguments import BOOLEAN, INTEGER, NUMBER, TEXT, Parser
from mft.commands.trained_model import final_folder, import_family
from mft.errors import UserError, printable


def parser() -> Parser:
    """Returns the command line of `mft generate`."""
    line = Parser("generate", 'RUN "PROMPT" ["PROMPT" …] [--max-new-tokens N] [--system TEXT] …', __doc__)
    for name, takes, default, meaning in (
        ("--max-new-tokens", INTEGER, 512, "tokens of an answer at most"),
        ("--do-sample", BOOLEAN, True, "draw the tokens; false: take the most likely one"),
        ("--temperature", NUMBER, 0.1, "sampling: above 1 more varied, towards 0 greedy"),
        ("--top-p", NUMBER, 0.95, "sampling: only the likeliest tokens that together have this probability"),
        ("--num-beams", INTEGER, 1, "beams of a beam search"),
        ("--repetition-penalty", NUMBER, 1.0, "above 1 makes repetitions less likely"),
        ("--seed", INTEGER, 0, "of the sampling"),
        ("--system", TEXT, None, "a system message before every prompt"),
        ("--base", TEXT, None, "where the base model of an adapter is, if it has moved since the training"),
        ("--trust-remote-code", BOOLEAN, False, "run Python code that comes with the model"),
    ):
        line.option(name, takes, meaning, default, formerly=True)
    line.plugins()
    return line


def command(arguments: Sequence[str]) -> None:
    """Prints the answers; with several prompts each under its prompt."""
    parsed = parser().parse(arguments or ["--help"])
    if len(parsed.words) < 2:
        raise UserError('mft generate needs a run and at least one prompt: mft generate RUN "def sort(".')
    from mft.data.tokenize import Encoder
    from mft.hardware import quiet_libraries
    from mft.model.generate import Answerer, check_options

    run, *prompts = parsed.words
    names = ("max_new_tokens", "top_p", "temperature", "num_beams", "repetition_penalty")
    options = {name: getattr(parsed, name) for name in names}
    check_options(**options)  # before a model loads
    quiet_libraries()
    import_family(run)  # first: the family of a plug-in may register the architecture that is loaded below
    base, trust = parsed.base or None, parsed.trust_remote_code
    answerer = Answerer(final_folder(run), Encoder.saved, base=base, trust_remote_code=trust)
    options |= {"do_sample": parsed.do_sample, "system": parsed.system or None, "seed": parsed.seed}
    answers = answerer.answer(prompts, **options)
    for prompt, answer in zip(prompts, answers, strict=True):
        text = printable(answer) if sys.stdout.isatty() else answer  # a file or a program gets it as it is
        print(f"── {prompt}\n{text}" if len(prompts) > 1 else text)
