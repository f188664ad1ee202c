"""Kernels that repeat themselves. No GPU is here: the tests say that there is one, and look at what torch is
told."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest
import torch

from mft.distributed.determinism import WORKSPACE, compute_deterministically, explain


@pytest.fixture(autouse=True)
def restored(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    for name in (*WORKSPACE, "FLASH_ATTENTION_DETERMINISTIC"):
        monkeypatch.setenv(name, "")
        del os.environ[name]
    filled = torch.utils.deterministic.fill_uninitialized_memory
    yield
    torch.use_deterministic_algorithms(False)
    torch.utils.deterministic.fill_uninitialized_memory = filled


def test_on_a_cpu_nothing_is_set() -> None:
    before = dict(os.environ)
    compute_deterministically(True)
    assert not torch.are_deterministic_algorithms_enabled() and dict(os.environ) == before


def test_on_a_gpu_torch_is_told_before_cuda_starts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    compute_deterministically(True)
    assert torch.are_deterministic_algorithms_enabled()
    assert not torch.is_deterministic_algorithms_warn_only_enabled()  # attention would then not repeat itself
    assert os.environ["CUBLAS_WORKSPACE_CONFIG"] == ":4096:8" and not torch.cuda.is_initialized()
    compute_deterministically(False)  # the next run of this process
    assert not torch.are_deterministic_algorithms_enabled()


def test_what_the_person_has_set_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":16:8")
    compute_deterministically(True)
    assert os.environ["CUBLAS_WORKSPACE_CONFIG"] == ":16:8"


def test_an_operation_without_such_a_kernel_is_named() -> None:
    torch.use_deterministic_algorithms(True)
    pooled, places = torch.nn.functional.max_pool2d(torch.rand(1, 1, 4, 4), 2, return_indices=True)
    with pytest.raises(RuntimeError) as error:
        torch.nn.functional.max_unpool2d(pooled, places, 2)
    told = str(explain(error.value))
    assert told.startswith("train.deterministic=true: on this GPU max_unpool") and "choose false" in told
    assert explain(RuntimeError("another error")) is None
