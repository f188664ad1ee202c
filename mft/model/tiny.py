"""A random llama and its tokenizer as an ordinary checkpoint folder, for tests and dry runs offline."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

from mft.errors import UserError, ranged
from mft.files.cache_folder import made_once
from mft.files.checksums import follow_umask
from mft.model.causal_lm import CausalLM
from mft.model.save import write_tokenizer

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

TEXT = (
    "def add(a, b):\n    return a + b\n",
    "import os\nfrom pathlib import Path\n\nclass Point:\n    def __init__(self, x, y):\n        "
    "self.x = x\n",
    "for i in range(10):\n    if i % 2 == 0:\n        print(i)\n    else:\n        continue\n",
    "<s>system\nYou are a helpful assistant.\n<s>human\nWrite a test for this function.<s>bot\n",
    "assert add(1, 2) == 3, 'the sum of one and two is three'\n",
    "The quick brown fox jumps over the lazy dog. Explain what the following code does, and name "
    "the function.\n",
)
"""What the tokenizer's merges are learnt from."""

EOS, PAD = "<|endoftext|>", "<|pad|>"
COMMON = {field.name for field in fields(CausalLM)}


@dataclass
class Tiny(CausalLM):
    """A llama with random weights under `<cache_dir>/tiny/<hash of its fields>`, made when it is first used.

    Widths are in tokens and units: keep hidden_size and intermediate_size multiples of 64, which 4-bit
    weights on CPU need. `path` stays empty.
    """

    public_name: ClassVar[str] = "tiny"

    path: str = ""
    """Stays empty."""

    cache_dir: str = ""
    """Where the folder is made, under tiny/."""

    hidden_size: int = ranged(64, min=1, max=2**16)
    """Width of the hidden states."""

    intermediate_size: int = ranged(128, min=1, max=2**18)
    """Width inside the MLP."""

    layers: int = ranged(2, min=1, max=1024)
    """Decoder layers."""

    heads: int = ranged(4, min=1)
    """Attention heads; divides hidden_size."""

    kv_heads: int = ranged(2, min=1)
    """Heads of keys and values; divides heads."""

    vocab_size: int = ranged(512, min=258, max=2**22)
    """Tokens, at least 256 bytes and two special ones; more than the tokenizer has are never used."""

    max_positions: int = ranged(4096, min=1, max=2**31 - 1)
    """Tokens of the longest sequence."""

    tied: bool = True
    """Whether the head shares the embedding's weights."""

    seed: int = 0
    """Of the random weights."""

    def _check_path(self) -> None:
        if self.path:
            raise UserError(f"model.path={self.path}: model=tiny makes its own weights; use model=auto")
        if not self.cache_dir:
            raise UserError("model.cache_dir is empty; the tiny model needs a folder to be made in")
        if self.hidden_size % self.heads or self.heads % self.kv_heads:
            raise UserError(
                f"model.hidden_size={self.hidden_size} must be a multiple of model.heads={self.heads}, "
                f"and that of model.kv_heads={self.kv_heads}"
            )
        folder = self._place()
        if folder.is_dir() and not (folder / "config.json").is_file():
            raise UserError(f"{folder} has no config.json; remove the folder: model=tiny then makes it again")

    def folder(self) -> Path:
        """Returns the checkpoint folder, made under a lock if it is not there yet."""
        return made_once(self._place(), self._make)

    def _place(self) -> Path:
        """Returns where its folder is or will be."""
        own = [field.name for field in fields(Tiny) if field.name not in ("cache_dir", *COMMON)]
        recipe = {name: getattr(self, name) for name in own} | {"text": TEXT, "version": 2}
        digest = hashlib.sha256(json.dumps(recipe, sort_keys=True).encode()).hexdigest()[:12]
        return Path(self.cache_dir).expanduser().resolve() / "tiny" / digest

    def location(self) -> str:
        return str(self.folder())

    def width(self) -> int | None:
        return self.hidden_size  # known before the folder is made

    def _make(self, folder: Path) -> None:
        import torch
        from safetensors.torch import save_file
        from transformers import LlamaConfig, LlamaForCausalLM

        tokenizer = byte_tokenizer(self.vocab_size)
        config = LlamaConfig(
            hidden_size=self.hidden_size,
            intermediate_size=self.intermediate_size,
            num_hidden_layers=self.layers,
            num_attention_heads=self.heads,
            num_key_value_heads=self.kv_heads,
            vocab_size=self.vocab_size,
            max_position_embeddings=self.max_positions,
            tie_word_embeddings=self.tied,
            bos_token_id=None,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
            architectures=["LlamaForCausalLM"],
            dtype="float32",
        )
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self.seed)
            weights = LlamaForCausalLM(config).state_dict()
        if self.tied:
            del weights["lm_head.weight"]
        # Not the model's save_pretrained: inside a process group it writes nothing on any rank but 0, without
        # an error.
        config.save_pretrained(folder)
        write_tokenizer(tokenizer, folder)
        save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
        follow_umask([folder / "model.safetensors"])


def byte_tokenizer(vocab_size: int) -> PreTrainedTokenizerFast:
    """Returns a byte-level BPE tokenizer of at most `vocab_size` tokens: the two special ones, 256 bytes,
    merges of TEXT."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[EOS, PAD],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(TEXT, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=EOS, pad_token=PAD)
