"""Loading by path: checks before anything heavy, tokens, attention, fingerprints; the tiny checkpoint."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from mft.errors import UserError
from mft.files.checksums import seal
from mft.model.causal_lm import CausalLM
from mft.model.model_folder import folder_fingerprint
from mft.model.tiny import Tiny


def copy_of(folder: Path, tmp_path: Path, **config: object) -> Path:
    copy = tmp_path / "copy"
    shutil.copytree(folder, copy)
    values = json.loads((copy / "config.json").read_text()) | config
    (copy / "config.json").write_text(json.dumps(values))
    return copy


def test_missing_path_names_the_nearest_sibling(tmp_path: Path) -> None:
    (tmp_path / "llama-7b").mkdir()
    with pytest.raises(UserError, match=r"llama-7c does not exist; did you mean .*llama-7b"):
        CausalLM(str(tmp_path / "llama-7c")).check()
    with pytest.raises(UserError, match="does not exist; run `mft demo` first"):
        CausalLM(str(tmp_path / "demo/model"), hint="run `mft demo` first").check()


@pytest.mark.usefixtures("hub_may_be_asked")
def test_folders_that_are_no_model(tmp_path: Path, tiny_folder: Path) -> None:
    with pytest.raises(UserError, match=r"has no config\.json"):
        CausalLM(str(tmp_path)).check()
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(UserError, match=r"no \*\.safetensors"):
        CausalLM(str(tmp_path)).check()
    (tmp_path / "config.json").rename(tmp_path / "adapter_config.json")
    with pytest.raises(UserError, match="holds an adapter"):
        CausalLM(str(tmp_path)).check()
    with pytest.raises(UserError, match="is a file"):
        CausalLM(str(tiny_folder / "config.json")).check()
    with pytest.raises(UserError, match="neither a folder nor a hub name"):
        CausalLM("owner/name with blanks").check()
    CausalLM(str(tiny_folder)).check()
    CausalLM("HuggingFaceTB/SmolLM2-135M-Instruct").check()


def test_impossible_asks_are_refused_before_loading(tiny_folder: Path) -> None:
    with pytest.raises(
        UserError, match=r"flash_attention_2 cannot run here: .*; use model.attention=auto or sdpa"
    ):
        CausalLM(str(tiny_folder), attention="flash_attention_2").check()
    with pytest.raises(UserError, match=r"model.attention='spda' is not one of .*; did you mean sdpa"):
        CausalLM(str(tiny_folder), attention="spda").check()
    with pytest.raises(UserError, match=r"model.gradient_checkpointing='ture' .*; did you mean true"):
        CausalLM(str(tiny_folder), gradient_checkpointing="ture").check()


def test_attention_is_set(tiny: Tiny, tiny_folder: Path) -> None:
    assert tiny.model(torch.float32).config._attn_implementation == "sdpa"
    eager = CausalLM(str(tiny_folder), attention="eager").model(torch.float32)
    assert eager.config._attn_implementation == "eager" and eager.training


def test_gradient_checkpointing_resolves(tiny: Tiny, monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny.model(torch.float32)
    for setting, small, large in (
        ("auto", False, True),
        (True, True, True),
        ("false", False, False),
        (False, False, False),
    ):
        family = CausalLM("x", gradient_checkpointing=setting)
        for threshold, on in ((10**9, small), (1000, large)):
            monkeypatch.setattr("mft.model.causal_lm.CHECKPOINTING_ABOVE", threshold)
            assert family.checkpoint(model) == on


def test_layers_to_shard(tiny: Tiny) -> None:
    model = tiny.model(torch.float32)
    assert tiny.layer_classes(model) == ["LlamaDecoderLayer"]
    assert CausalLM("x", shard_layers=["Block"]).layer_classes(model) == ["Block"]


def test_a_damaged_base_is_refused_before_it_is_loaded(tiny_folder: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(tiny_folder, tmp_path / "base")
    (folder / "chat_template.jinja").write_text("{{ eos_token }}")
    seal(folder)
    CausalLM(str(folder)).check()
    (folder / "chat_template.jinja").write_text("{{ bos_token }}")
    with pytest.raises(
        UserError, match=r"base is damaged: chat_template\.jinja has the checksum .* on purpose"
    ):
        CausalLM(str(folder)).check()


def test_fingerprint_tells_weights_apart(tiny_folder: Path, tmp_path: Path) -> None:
    folder = copy_of(tiny_folder, tmp_path)
    (folder / "config.json").write_bytes((tiny_folder / "config.json").read_bytes())
    assert CausalLM(str(folder)).fingerprint() == CausalLM(str(tiny_folder)).fingerprint()
    weights = load_file(folder / "model.safetensors")
    save_file(
        {k: v + 0.01 for k, v in weights.items()}, folder / "model.safetensors", metadata={"format": "pt"}
    )
    assert CausalLM(str(folder)).fingerprint() != CausalLM(str(tiny_folder)).fingerprint()
    assert CausalLM("owner/name").fingerprint() == "owner/name@main"


def test_a_hub_name_that_cannot_be_loaded_is_a_sentence() -> None:
    with pytest.raises(UserError, match=r"model.path=nobody/nothing cannot be loaded: no such folder"):
        CausalLM("nobody/nothing").tokenizer()


def test_tiny_takes_no_path(tmp_path: Path) -> None:
    with pytest.raises(
        UserError, match=r"model.path=weights: model=tiny makes its own weights; .* model=auto"
    ):
        Tiny(path="weights", cache_dir=str(tmp_path)).check()


def test_a_tiny_folder_without_its_config_is_a_sentence(tmp_path: Path) -> None:
    family = Tiny(cache_dir=str(tmp_path))
    (family.folder() / "config.json").unlink()
    with pytest.raises(UserError, match=r"tiny/\w+ has no config\.json; remove the folder"):
        family.check()


def test_tiny_is_made_once(tmp_path: Path) -> None:
    families = [Tiny(cache_dir=str(tmp_path)) for _ in range(4)]
    with ThreadPoolExecutor(4) as pool:
        folders = set(pool.map(lambda family: family.folder(), families))
    (folder,) = folders
    assert sorted(p.name for p in (tmp_path / "tiny").iterdir()) in (
        [folder.name],
        [folder.name, f"{folder.name}.lock"],
    )
    written = (folder / "model.safetensors").stat().st_mtime_ns
    assert families[0].folder() == folder and (folder / "model.safetensors").stat().st_mtime_ns == written
    other = Tiny(cache_dir=str(tmp_path), seed=1).folder()
    assert other != folder and other.exists()


def test_tiny_is_made_by_any_rank(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from transformers.distributed import mixin

    monkeypatch.setattr(mixin, "_is_torch_distributed_initialized", lambda: True)
    monkeypatch.setattr(mixin, "_get_torch_distributed_rank", lambda: 1)
    assert Tiny(cache_dir=str(tmp_path)).model(torch.float32).config.vocab_size == 512


def test_tiny_is_deterministic(tmp_path: Path) -> None:
    one, two = (Tiny(cache_dir=str(tmp_path / name)) for name in "ab")
    assert one.fingerprint() == two.fingerprint()
    assert (one.folder() / "tokenizer.json").read_bytes() == (two.folder() / "tokenizer.json").read_bytes()
    torch.manual_seed(3)
    before = torch.random.get_rng_state()
    Tiny(cache_dir=str(tmp_path / "c")).folder()
    assert torch.equal(before, torch.random.get_rng_state())


def test_tiny_tokenizer_encodes_anything(tokenizer) -> None:
    for text in ("def f(x):\n\treturn x  # ½ 漢字 🙂\n", "", "<s>human\n hi <s>bot\n"):
        assert tokenizer.decode(tokenizer(text, add_special_tokens=False).input_ids) == text
    assert len(tokenizer) <= 512 and len({tokenizer.eos_token_id, tokenizer.pad_token_id}) == 2


def test_tiny_refuses_impossible_sizes(tmp_path: Path) -> None:
    for values, key in (({"heads": 3}, "hidden_size"), ({"vocab_size": 100}, "vocab_size")):
        with pytest.raises(UserError, match=f"model.{key}"):
            Tiny(cache_dir=str(tmp_path), **values).check()
    with pytest.raises(UserError, match="cache_dir"):
        Tiny().check()


@pytest.mark.usefixtures("hub_may_be_asked")
def test_components_import_nothing_heavy() -> None:
    code = (
        "import sys, mft.model.causal_lm, mft.model.tiny, mft.model.peft.qlora, mft.model.export, "
        "mft.model.generate\n"
        "mft.model.causal_lm.CausalLM('HuggingFaceTB/SmolLM2-135M-Instruct').check()\n"
        "mft.model.peft.qlora.QLora().check()\n"
        "print([m for m in ('torch', 'transformers', 'peft', 'bitsandbytes') if m in sys.modules])"
    )
    assert (
        subprocess.run(
            [sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=300
        ).stdout.strip()
        == "[]"
    )


def test_a_damaged_header_of_weights_is_another_model_and_fills_no_memory(
    tiny_folder: Path, tmp_path: Path
) -> None:
    folder = shutil.copytree(tiny_folder, tmp_path / "model")
    with (folder / "model.safetensors").open("r+b") as file:
        file.write(b"\xff" * 8)
    assert folder_fingerprint(folder) != folder_fingerprint(tiny_folder)
