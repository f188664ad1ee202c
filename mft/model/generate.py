"""Generates answers with a trained model, from prompts encoded exactly as in training."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from mft.batch import ROLES, Message
from mft.errors import UserError, shortened
from mft.files.checksums import require_sound
from mft.model.causal_lm import CausalLM
from mft.model.model_folder import read_config
from mft.model.origin import Origin

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedTokenizerBase

Conversation = str | Sequence[Message | Mapping[str, str]]
"""A prompt of one user turn, or messages with `role` (system, user or human, assistant or bot) and
`content`."""

log = logging.getLogger(__name__)


class PromptEncoder(Protocol):
    """Encodes conversations as training did; `mft.data.tokenize.Encoder` is one. Handed in, as models know no
    data."""

    tokenizer: PreTrainedTokenizerBase

    def encode_prompt(self, messages: Sequence[Message]) -> list[int]:
        """Returns the ids after which the model is to answer."""


class Answerer:
    """A trained folder, ready to answer: a run folder (its final/), a checkpoint, an adapter or a model
    folder.

    encoder: makes the prompt encoder of a saved tokenizer, `Encoder.saved`; tokenizer: instead of the
    folder's own, to ask an untrained base in the form of a fine-tuned one; base: where the adapter's base
    model is, if not where mft.json says. An adapter runs on the base as it was trained: same dtype, same
    quantisation.
    """

    def __init__(
        self,
        folder: Path | str,
        encoder: Callable[[PreTrainedTokenizerBase], PromptEncoder],
        tokenizer: PreTrainedTokenizerBase | None = None,
        base: str | None = None,
        trust_remote_code: bool = False,
    ):
        import torch

        self.folder = model_folder(Path(folder))
        require_sound(self.folder)
        if trust_remote_code:
            log.warning("trust_remote_code=true: Python code of the model of %s will be run", self.folder)
        # Not AutoTokenizer: the family also finds an EOS that only config.json names.
        own = CausalLM(str(self.folder), trust_remote_code=trust_remote_code)
        self.tokenizer = tokenizer or own.tokenizer()
        if self.tokenizer.chat_template is None:
            raise UserError(f"the tokenizer in {self.folder} has no chat template, so it cannot answer")
        self.encoder = encoder(self.tokenizer)
        device = "cuda" if torch.cuda.is_available() else "cpu"
        self.model = load(self.folder, base, trust_remote_code).to(device).eval()

    def answer(self, conversations: Sequence[Conversation], **options: Any) -> list[str]:
        """Returns one answer for each conversation; the options are those of `answer`."""
        return answer(self.model, self.encoder, conversations, **options)


def answer(
    model: Any,
    encoder: PromptEncoder,
    conversations: Sequence[Conversation],
    system: str | None = None,
    max_new_tokens: int = 512,
    top_p: float = 0.95,
    temperature: float = 0.1,
    do_sample: bool = True,
    num_beams: int = 1,
    repetition_penalty: float = 1.0,
    seed: int | None = None,
    together: bool = False,
    device: torch.device | None = None,
) -> list[str]:
    """Returns one answer for each conversation, all generated as one batch by a plain or peft model in eval
    mode.

    system: a system message put before each that has none; seed: makes sampling repeatable, and keeps the
    random state outside; together: all ranks ask the same, and none stops before the others, since they hold
    the model's parts; device: where the model computes, None = where its first parameter lies, which an
    offloaded one does not compute on. Raises UserError as `check_options`.
    """
    import torch

    check_options(max_new_tokens, top_p, temperature, num_beams, repetition_penalty)
    if not conversations:
        return []
    device, tokenizer = device or next(model.parameters()).device, encoder.tokenizer
    prompts = [encoder.encode_prompt(messages(conversation, system)) for conversation in conversations]
    # Padded on the left, the answers of all rows start in the same column.
    inputs = tokenizer.pad({"input_ids": prompts}, padding_side="left", return_tensors="pt").to(device)
    sampling: dict[str, Any] = {"temperature": temperature, "top_p": top_p} if do_sample else {}
    devices = [device] if device.type == "cuda" else []
    with torch.no_grad(), torch.random.fork_rng(devices, enabled=seed is not None):
        if seed is not None:
            torch.manual_seed(seed)
        ids = model.generate(
            **inputs,
            max_new_tokens=max_new_tokens,
            do_sample=do_sample,
            num_beams=num_beams,
            repetition_penalty=repetition_penalty,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
            use_cache=True,
            synced_gpus=together,
            **sampling,
        )
    new = ids[:, inputs["input_ids"].shape[1] :]
    # Not stripped: a function's body begins with its indentation.
    return tokenizer.batch_decode(new, skip_special_tokens=True, clean_up_tokenization_spaces=False)


def check_options(
    max_new_tokens: int, top_p: float, temperature: float, num_beams: int, repetition_penalty: float
) -> None:
    """Raises UserError for values of these options of `answer` with which nothing can be generated."""
    greedy = "; --do-sample false takes the likeliest token"
    for name, value, valid, allowed in (
        ("max_new_tokens", max_new_tokens, max_new_tokens >= 1, "at least 1"),
        ("num_beams", num_beams, num_beams >= 1, "at least 1"),
        ("temperature", temperature, 0 < temperature < math.inf, f"greater than 0{greedy}"),
        ("repetition_penalty", repetition_penalty, 0 < repetition_penalty < math.inf, "greater than 0"),
        ("top_p", top_p, 0 < top_p <= 1, "greater than 0 and at most 1"),
    ):
        if not valid:
            raise UserError(f"{name}={value} must be {allowed}.")


def messages(conversation: Conversation, system: str | None = None) -> list[Message]:
    """Returns a conversation as messages; UserError for an unknown role or a turn without role and
    content."""
    turns = [Message("user", conversation)] if isinstance(conversation, str) else list(conversation)
    parsed = []
    for turn in turns:
        if not isinstance(turn, Message):
            for key in ("role", "content"):
                if not isinstance(turn.get(key), str):
                    raise UserError(f"a turn to be answered needs the text {key}: {shortened(dict(turn))}")
            if turn["role"] not in ROLES:
                allowed = ", ".join(ROLES)
                raise UserError(f"a turn to be answered has the role {turn['role']!r}; allowed: {allowed}")
            turn = Message(ROLES[turn["role"]], turn["content"])
        parsed.append(turn)
    if system and not (parsed and parsed[0].role == "system"):
        parsed.insert(0, Message("system", system))
    return parsed


def load(folder: Path, base: str | None = None, trust_remote_code: bool = False) -> Any:
    """Returns the model of a folder in the dtype it was saved in (float32 where its config names none), an
    adapter on its base."""
    import torch

    if (folder / "adapter_config.json").exists():
        from peft import PeftModel

        return PeftModel.from_pretrained(Origin.read(folder, base).load(trust_remote_code), str(folder))
    if base:
        raise UserError(f"base={base}: {folder} holds a full model, which needs no base; leave it out")
    config = read_config(folder)
    dtype = getattr(torch, config.get("dtype") or config.get("torch_dtype") or "float32")
    return CausalLM(str(folder), trust_remote_code=trust_remote_code).model(dtype)


def model_folder(folder: Path) -> Path:
    """Returns the folder with the weights: itself, or the final/ or model/ in a run or checkpoint folder."""
    for candidate in (folder, folder / "final", folder / "model"):
        if any((candidate / name).exists() for name in ("adapter_config.json", "config.json")):
            return candidate
    raise UserError(
        f"{folder} holds no model: neither it nor its final/ has a config.json or adapter_config.json"
    )
