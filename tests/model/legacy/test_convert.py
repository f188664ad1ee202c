"""An original checkpoint is converted once, into the cache: when, where, by whom, and what is said when it is
gone."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from mft.config.build import build
from mft.config.compose import compose_resolved
from mft.errors import UserError
from mft.model.causal_lm import CausalLM
from mft.model.export import save_native
from mft.model.legacy.native import NormHead
from mft.model.legacy.original import Original
from mft.model.merge import merge
from mft.model.model_folder import folder_fingerprint
from mft.model.origin import NOTE, Origin
from mft.model.peft.lora import Lora
from tests.model import originals
from tests.model.legacy.adapters import saved_adapter
from tests.model.vocabularies import released


def family_of(name: str, folder: Path, cache: Path) -> Original:
    overrides = [f"model={name}", f"model.path={folder}", f"cache_dir={cache}"]
    family = build(compose_resolved(overrides).model, "model")
    family.check()
    return family


def folders(cache: Path) -> list[Path]:
    return sorted(path for path in (cache / "native").glob("*") if path.is_dir())


@pytest.fixture
def adapter(tokenizer, tmp_path: Path) -> Path:
    """An adapter trained on a Baichuan 2 in its original format, in `source`."""
    folder = released(tmp_path / "source", "baichuan2_7b")
    family = family_of("baichuan2_7b", folder, tmp_path / "cache")
    saved_adapter(family, tokenizer, tmp_path / "adapter")
    return tmp_path / "adapter"


def test_checking_converts_nothing_and_loading_does_so_once(tmp_path: Path) -> None:
    folder, cache = originals.write(tmp_path / "source", "baichuan2_13b"), tmp_path / "cache"
    family = family_of("baichuan2_13b", folder, cache)
    before = family.fingerprints()
    Lora(targets=["q_proj"]).check_against(family, "fp32")
    assert not folders(cache)
    model = family.model(torch.float32)
    (made,) = folders(cache)
    written = (made / "model.safetensors").stat().st_mtime_ns
    again = family_of("baichuan2_13b", folder, cache).model(torch.float32)
    assert (made / "model.safetensors").stat().st_mtime_ns == written and folders(cache) == [made]
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), again.parameters(), strict=True))
    # whoever loads the folder by its own path gets the same model, its head still trainable as what it is
    plain = CausalLM(str(made)).model(torch.float32)
    assert isinstance(plain.get_output_embeddings(), NormHead)
    assert torch.equal(
        plain.get_output_embeddings().weight, load_file(folder / "model.safetensors")["lm_head.weight"]
    )
    assert family.fingerprints() == before and family.fingerprint() == folder_fingerprint(folder)


def test_other_weights_and_other_readings_have_other_folders(tmp_path: Path) -> None:
    folder, cache = originals.write(tmp_path / "source", "chatglm2_32k"), tmp_path / "cache"
    first = family_of("chatglm2_32k", folder, cache).source()
    other_reading = family_of("chatglm3_32k", folder, cache).source()
    originals.write(folder, "chatglm2_32k", seed=1)
    other_weights = family_of("chatglm2_32k", folder, cache).source()
    assert len({first, other_reading, other_weights}) == 3


CONVERT = """
import sys
from pathlib import Path
from tests.model.legacy.test_convert import family_of
print(family_of("qwen", Path(sys.argv[1]), Path(sys.argv[2])).source())
"""


def test_processes_that_ask_at_once_get_one_folder(tmp_path: Path) -> None:
    folder, cache = originals.write(tmp_path / "source", "qwen"), tmp_path / "cache"
    originals.sharded(folder)
    words = [sys.executable, "-c", CONVERT, str(folder), str(cache)]
    processes = [subprocess.Popen(words, stdout=subprocess.PIPE, text=True) for _ in range(2)]
    sources = [process.communicate(timeout=300)[0].splitlines()[-1] for process in processes]
    (made,) = folders(cache)
    assert sources == [str(made)] * 2
    assert sorted(file.name for file in made.glob("*.safetensors*")) == [
        "model-00001-of-00002.safetensors",
        "model-00002-of-00002.safetensors",
        "model.safetensors.index.json",
    ]


def test_what_a_killed_process_left_is_removed_and_a_failed_conversion_leaves_nothing(tmp_path: Path) -> None:
    folder, cache = originals.write(tmp_path / "source", "qwen"), tmp_path / "cache"
    made = Path(family_of("qwen", folder, cache).source())
    made.rename(made.with_name(f"{made.name}.1.tmp"))
    assert Path(family_of("qwen", folder, cache).source()) == made and folders(cache) == [made]
    weights = originals.write(tmp_path / "broken", "qwen") / "config.json"
    weights.write_text(json.dumps(json.loads(weights.read_text()) | {"num_hidden_layers": 3}))
    with pytest.raises(UserError, match="lacks the weight"):
        family_of("qwen", tmp_path / "broken", cache).source()
    assert folders(cache) == [made]


def test_a_disk_that_is_too_small_is_named_before_anything_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, cache = originals.write(tmp_path / "source", "qwen"), tmp_path / "cache"
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=2**20))
    with pytest.raises(
        UserError, match=r"native folder takes 0\.06 GiB in .*, where 0\.00 GiB are free; make room"
    ):
        family_of("qwen", folder, cache).source()
    assert not folders(cache)


def test_a_cache_that_is_gone_is_told_at_merge_with_the_command(adapter: Path, tmp_path: Path) -> None:
    merge(adapter, tmp_path / "merged")
    shutil.rmtree(tmp_path / "cache")
    source = tmp_path / "source"
    words = rf"mft convert model=baichuan model\.path={source} model\.positions=rope model\.norm_head=\w+ --out FOLDER`"
    with pytest.raises(UserError, match=rf"gone from the cache: write one with `{words}; give --base FOLDER"):
        merge(adapter, tmp_path / "second")
    with pytest.raises(UserError, match="is not a native folder"):
        merge(adapter, tmp_path / "second", base=str(source))
    save_native(family_of("baichuan2_7b", source, tmp_path / "cache"), tmp_path / "native")
    merge(adapter, tmp_path / "second", base=str(tmp_path / "native"))
    one, other = (load_file(tmp_path / name / "model.safetensors") for name in ("merged", "second"))
    assert all(torch.allclose(one[name], other[name], atol=1e-6) for name in one)


def test_an_adapter_of_an_earlier_version_is_told_the_same(adapter: Path, tmp_path: Path) -> None:
    """Its note names the original checkpoint, and how that was read."""
    note = json.loads((adapter / NOTE).read_text())
    note["origin"] |= {
        "path": str(tmp_path / "source"),
        "original": {"class": "Baichuan", "positions": "rope", "norm_head": True},
    }
    del note["origin"]["converted_from"]
    (adapter / NOTE).write_text(json.dumps(note))
    with pytest.raises(
        UserError, match=r"`mft convert model=baichuan model\.path=\S+ .*model\.norm_head=True --out"
    ):
        Origin.read(adapter).family()
    save_native(family_of("baichuan2_7b", tmp_path / "source", tmp_path / "cache"), tmp_path / "native")
    merge(adapter, tmp_path / "merged", base=str(tmp_path / "native"))
