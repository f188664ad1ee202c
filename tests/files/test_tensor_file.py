"""Files written tensor by tensor: to the byte those that safetensors writes."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from mft.files import tensor_file
from mft.files.tensor_file import DTYPES, size_of, write_tensors

METADATA = {"pieces": '[{"name": "é"}]'}


def test_all_dtypes_and_shapes_are_written_as_safetensors_writes_them(tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(0)
    tensors = {"scalar": torch.tensor(1.5), "é/none": torch.zeros(0, 4)}
    for number, name in enumerate(DTYPES):
        for shape in ((5,), (3, number % 3)):
            values = torch.randint(0, 2, shape, generator=generator)
            tensors[f"{number % 4}/{name}/{len(shape)}"] = values.to(getattr(torch, name))
    for written in (tensors, {}):
        save_file(written, tmp_path / "theirs", METADATA)
        write_tensors(tmp_path / "ours", written, METADATA)
        assert (tmp_path / "ours").read_bytes() == (tmp_path / "theirs").read_bytes()
        assert (tmp_path / "ours").stat().st_size == size_of(written, METADATA)


def test_views_and_tensors_of_many_chunks_are_written_as_they_are(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tensor_file, "CHUNK", 64)
    flat = torch.randn(300, generator=torch.Generator().manual_seed(0))
    tensors = {"a": flat[:70], "b": flat[50:290], "t": flat[:200].view(10, 20).T}
    write_tensors(tmp_path / "file", tensors, {})
    found = load_file(tmp_path / "file")
    assert all(torch.equal(found[name], tensor) for name, tensor in tensors.items())


def test_a_dtype_that_has_no_name_is_refused_before_anything_is_written(tmp_path: Path) -> None:
    with pytest.raises(KeyError, match="complex64"):
        write_tensors(tmp_path / "file", {"a": torch.zeros(2, dtype=torch.complex64)}, {})
    assert not list(tmp_path.iterdir())
