"""Which tokens end an answer and fill rows, step by step, and that a saved model says so."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from mft.errors import UserError
from mft.model.causal_lm import CausalLM
from mft.model.export import save_final
from mft.model.peft.lora import Lora
from mft.model.special_tokens import PADS
from mft.model.tiny import EOS, PAD, Tiny
from mft.model.token_loss import TokenLoss


def without(tiny_folder: Path, tmp_path: Path, *tokens: str, **config: object) -> str:
    """A copy of the tiny model whose tokenizer names none of the tokens (eos_token, ...); config: into
    config.json."""
    folder = tmp_path / "model"
    shutil.copytree(tiny_folder, folder)
    file = folder / "tokenizer_config.json"
    file.write_text(json.dumps({k: v for k, v in json.loads(file.read_text()).items() if k not in tokens}))
    (folder / "special_tokens_map.json").unlink(missing_ok=True)
    file = folder / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | config))
    return str(folder)


def test_eos_is_the_one_asked_for_else_the_tokenizers(tiny_folder: Path) -> None:
    assert CausalLM(str(tiny_folder), eos_token=PAD).tokenizer().eos_token == PAD
    assert CausalLM(str(tiny_folder)).tokenizer().eos_token == EOS


@pytest.mark.parametrize(("ids", "token"), [(0, EOS), ([0, 1], EOS), ([9_999, 1], PAD)])
def test_eos_is_the_configs_where_the_tokenizer_names_none(
    ids: object, token: str, tiny_folder: Path, tmp_path: Path
) -> None:
    tokenizer = CausalLM(without(tiny_folder, tmp_path, "eos_token", eos_token_id=ids)).tokenizer()
    assert tokenizer.eos_token == token


@pytest.mark.parametrize(
    ("ids", "message"),
    [
        (
            None,
            r"model\.eos_token: neither the tokenizer nor config\.json of .* names a token that ends an answer; set",
        ),
        ([], r"model\.eos_token: neither the tokenizer nor"),
        (
            9_999,
            r"eos_token_id=9999 is outside the vocabulary of its \d+ tokens; name the "
            r"token",
        ),
    ],
)
def test_no_eos_at_all_is_told(ids: object, message: str, tiny_folder: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=message):
        CausalLM(without(tiny_folder, tmp_path, "eos_token", eos_token_id=ids)).tokenizer()


@pytest.mark.parametrize("key", ["eos_token", "pad_token"])
def test_a_token_that_is_not_in_the_vocabulary_is_told_with_the_nearest(key: str, tiny_folder: Path) -> None:
    with pytest.raises(
        UserError, match=rf"model\.{key}='<\|endoftxt\|>' is not in .*; did you mean <\|endoftext\|>"
    ):
        CausalLM(str(tiny_folder), **{key: "<|endoftxt|>"}).tokenizer()


def test_pad_is_the_one_asked_for_else_the_tokenizers_else_made_for_it_else_unk_else_eos(
    tiny_folder: Path, tmp_path: Path
) -> None:
    assert CausalLM(str(tiny_folder), pad_token=EOS).tokenizer().pad_token == EOS
    assert CausalLM(str(tiny_folder)).tokenizer().pad_token == PAD
    folder = Path(without(tiny_folder, tmp_path, "pad_token"))
    assert PAD in PADS and CausalLM(str(folder)).tokenizer().pad_token == PAD
    # a vocabulary without such a token
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (folder / name).write_text((folder / name).read_text().replace(PAD, "<|other|>"))
    assert CausalLM(str(folder)).tokenizer().pad_token == EOS
    values = json.loads((folder / "tokenizer_config.json").read_text())
    (folder / "tokenizer_config.json").write_text(json.dumps(values | {"unk_token": "<|other|>"}))
    assert CausalLM(str(folder)).tokenizer().pad_token == "<|other|>"


def test_a_saved_model_stops_at_the_trained_eos(tiny_folder: Path, tmp_path: Path) -> None:
    """generate() of transformers, and vLLM, know of the folder's generation_config.json, not of its
    tokenizer."""
    prompt = torch.tensor([[40, 41, 42]])
    said = CausalLM(str(tiny_folder)).model(torch.float32).generate(prompt, do_sample=False, max_new_tokens=8)
    assert said.shape[1] == 11
    base = without(tiny_folder, tmp_path, "pad_token", eos_token_id=[5, 0], pad_token_id=None)
    plain = CausalLM(base)
    family = CausalLM(base, eos_token=plain.read_tokenizer().convert_ids_to_tokens(int(said[0, 3])))
    tokenizer = family.tokenizer()
    assert tokenizer.eos_token_id == said[0, 3]
    save_final(TokenLoss(family.model(torch.float32), family), tokenizer, tmp_path / "final")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "final")
    assert loaded.generate(prompt, do_sample=False, max_new_tokens=8).tolist() == said[:, :4].tolist()
    assert (
        loaded.generation_config.eos_token_id == [tokenizer.eos_token_id, 5, 0] == loaded.config.eos_token_id
    )
    assert (
        loaded.generation_config.pad_token_id == tokenizer.pad_token_id and loaded.config.pad_token_id is None
    )
    # loaded, and saved again, it is the same
    again = CausalLM(str(tmp_path / "final"))
    assert again.tokenizer().eos_token == tokenizer.eos_token
    save_final(TokenLoss(again.model(torch.float32), again), again.tokenizer(), tmp_path / "again")
    same = [json.loads((tmp_path / n / "generation_config.json").read_text()) for n in ("final", "again")]
    assert same[0] == same[1]


def test_an_adapter_keeps_its_eos_in_its_tokenizer(tiny: Tiny, tmp_path: Path) -> None:
    family = CausalLM(tiny.source(), eos_token=PAD)
    save_final(
        TokenLoss(Lora().attach(family.model(torch.float32), family), family), family.tokenizer(), tmp_path
    )
    assert json.loads((tmp_path / "tokenizer_config.json").read_text())["eos_token"] == PAD
    assert not (tmp_path / "config.json").exists()
