"""Write pickled weights as safetensors, and original or quantised checkpoints as native folders.

With a folder alone: write its pytorch_model*.bin files as model*.safetensors beside them. They are read as
tensors and plain containers only: a file that would run code is refused.

With a family of an original format (chatglm2, chatglm3, codegeex2, qwen, baichuan, aquila2, …; see
conf/model): write the checkpoint as a native folder that transformers loads by itself. Adapters trained on
the one work on the other. A run needs no such step: it converts into the cache when it first uses the
checkpoint.

With a checkpoint that is quantised (fp8, mxfp4, bitsandbytes, compressed-tensors): write its weights
dequantised, in the dtype that its config.json names.

examples:
  mft convert FOLDER
  mft convert model=FAMILY model.path=FOLDER --out NATIVE
  mft convert model.path=QUANTISED --out PLAIN
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from mft.commands.arguments import FOLDER, Parser
from mft.console.screen import say
from mft.errors import UserError


def parser() -> Parser:
    """Returns the command line of `mft convert`."""
    words = "FOLDER   or   mft convert [model=FAMILY] model.path=FOLDER --out DIR"
    line = Parser("convert", words, __doc__)
    line.option("--out", FOLDER, "the folder to write; it must not exist yet", formerly=True)
    line.plugins()
    return line


def command(arguments: Sequence[str]) -> None:
    """Converts a folder's weights in place, or a checkpoint into a new folder."""
    parsed = parser().parse(arguments or ["--help"])
    if len(parsed.words) == 1 and "=" not in parsed.words[0] and not parsed.out:
        from mft.model.legacy.pickled import convert as convert_pickled

        for file in convert_pickled(Path(parsed.words[0]).expanduser()):
            say(file)
        return
    from mft.config.overrides import key_of

    other = [word for word in parsed.words if "=" not in word or key_of(word).partition(".")[0] != "model"]
    if other or not parsed.words or not parsed.out:
        typed = " ".join(arguments)
        raise UserError(f"mft convert takes a folder alone, or model=…, model.… and --out DIR, got {typed}.")
    write_native(parsed.words, parsed.out)


def write_native(overrides: Sequence[str], out: Path) -> None:
    """Writes the model that overrides compose as a folder that transformers loads by itself."""
    from mft.config.build import component
    from mft.config.compose import compose_resolved
    from mft.model.export import save_native
    from mft.model.legacy.original import Original

    family = component(compose_resolved(overrides), "model")
    family.check()
    if not isinstance(family, Original) and not family.weight_format().method:
        model = " ".join(overrides)
        raise UserError(f"{model} is native already: neither quantised nor in an original format.")
    save_native(family, out.expanduser())
    say(f"written to {out}")
