"""How much memory a rank takes while it loads and trains a model of some hundred megabytes.

Counted are the anonymous and the shared pages of the process (RssAnon + RssShmem): tensors, wherever they
come from. Pages of the mapped checkpoint are counted apart (RssFile): they are the page cache, which the
ranks of a machine have once and the kernel takes back when it needs to. A process of its own reads the
numbers every millisecond, so that nothing that blocks the rank's interpreter hides a peak. malloc is told to
give what is freed back to the kernel at once: it keeps blocks of some megabytes otherwise, and its gaps are
not a GPU's.
"""

from __future__ import annotations

import ctypes
import gc
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from mft.batch import Batch
from mft.distributed import sharded_state
from mft.distributed.engine import Engine
from mft.model.causal_lm import CausalLM
from mft.model.export import save_final
from mft.model.peft.full import Full
from mft.model.tiny import Tiny
from mft.model.token_loss import TokenLoss

WATCH = """
import select, sys
def now():
    fields = dict(line.split(":", 1) for line in open(f"/proc/{sys.argv[1]}/status"))
    anon, shared, file = (int(fields[name].split()[0]) / 1024 for name in ("RssAnon", "RssShmem", "RssFile"))
    return anon + shared, file
first = peak = now()
print(*first, flush=True)
while not select.select([sys.stdin], [], [], 0.001)[0]:
    peak = max(peak[0], now()[0]), max(peak[1], now()[1])
last = now()
print(*(max(a, b) - c for a, b, c in zip(peak, last, first)), last[0] - first[0], flush=True)
"""


class Watch:
    """Context that knows afterwards, in MiB, how far the process's memory rose above where it began: `peak`,
    of mapped files `files`, and what stayed, `kept`."""

    peak = files = kept = 0.0

    def __enter__(self) -> Watch:
        gc.collect()
        command = [sys.executable, "-S", "-c", WATCH, str(os.getpid())]
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        assert self._process.stdout
        self._process.stdout.readline()  # it has begun
        return self

    def __exit__(self, *error: Any) -> None:
        gc.collect()
        out, _ = self._process.communicate("end\n", timeout=60)
        self.peak, self.files, self.kept = map(float, out.split())


def give_back_what_is_freed() -> None:
    """Fixes the size from which malloc maps memory, which would grow with what is freed."""
    m_mmap_threshold = -3
    assert ctypes.CDLL(None).mallopt(m_mmap_threshold, 64 * 1024) == 1


def big_folder(root: Path) -> Path:
    """Returns a checkpoint of 61 million parameters in fp32 (234 MiB) in shards of 40 MB, made there."""
    made = Tiny(cache_dir=str(root), hidden_size=512, intermediate_size=2048, layers=15, vocab_size=8192)
    family = CausalLM(str(made.folder()))
    family.model(torch.float32).save_pretrained(root / "big", max_shard_size="40MB")
    family.tokenizer().save_pretrained(root / "big")
    return root / "big"


def loading(backend: Any, peft: Full, path: str) -> dict[str, float]:
    """Loads and prepares a model as a run does; returns in MiB how far this rank's memory rose until it was
    loaded (`load`) and prepared (`prepare`), and how much of the checkpoint it read (`read`)."""
    engine = backend.start("fp32", cpu=True)
    torch.manual_seed(0)
    family = CausalLM(path)
    with Watch() as until_prepared:
        quantised = peft.quantization(torch.float32)
        with Watch() as until_loaded, engine.loading(quantised is not None) as device:
            model = family.model(torch.float32, quantised, compute_dtype=torch.float32, device=device)
        module = TokenLoss(peft.attach(model, family), family)
        optimizer = torch.optim.AdamW([p for p in module.parameters() if p.requires_grad])
        engine.prepare(module, optimizer)
    found = {"load": until_loaded.peak, "prepare": until_prepared.peak, "read": until_prepared.files}
    del model, module, optimizer
    engine.close()
    return found


def loadings(cases: dict[str, tuple[Any, Full]], first: str, path: str) -> dict[str, dict[str, float]]:
    """Returns `loading` of each case; two have loaded the model in `first` before, so that all imports are
    done."""
    torch.set_num_threads(1)
    give_back_what_is_freed()
    for name in ("zero3-full", "fsdp-qlora"):
        loading(*cases[name], first)
    return {name: loading(backend, peft, path) for name, (backend, peft) in cases.items()}


def trained(engine: Engine, peft: Full, path: str, steps: int) -> None:
    """Loads and prepares a model and trains it on short rows; the engine keeps it."""
    torch.manual_seed(0)
    family = CausalLM(path)
    quantised = peft.quantization(torch.float32)
    with engine.loading(quantised is not None) as device:
        model = family.model(torch.float32, quantised, compute_dtype=torch.float32, device=device)
    module = TokenLoss(peft.attach(model, family), family)
    optimizer = torch.optim.AdamW([p for p in module.parameters() if p.requires_grad], fused=True)
    del model
    module, optimizer = engine.prepare(module, optimizer)
    ids_BT = torch.arange(16)[None] + engine.rank
    zeros_BT = torch.zeros_like(ids_BT)
    batch = Batch(ids_BT, ids_BT, zeros_BT, zeros_BT, torch.arange(16)[None])
    for _ in range(steps):
        with engine.accumulating(last=True):
            nll_BT, _ = module(batch)
            engine.backward(nll_BT.sum() / 32)
        assert engine.step(1.0) > 0


def training(backend: Any, peft: Full, path: str, steps: int = 2) -> float:
    """Returns in MiB how far this rank's memory rose while a model was loaded, prepared and trained on short
    rows."""
    engine = backend.start("fp32", cpu=True)
    with Watch() as watch:
        trained(engine, peft, path, steps)
    engine.close()
    return watch.peak


def trainings(cases: dict[str, tuple[Any, Full]], first: str, path: str) -> dict[str, float]:
    """Returns `training` of each case; each has trained the model in `first` before, so that all imports are
    done."""
    torch.set_num_threads(1)
    give_back_what_is_freed()
    for backend, peft in cases.values():
        training(backend, peft, first, steps=1)
    return {name: training(backend, peft, path) for name, (backend, peft) in cases.items()}


def save_all_at_once(engine: Engine, folder: Path) -> None:
    """Writes the tensors of a resume state as `Engine.save_state` did before: copied, and all at once."""
    parts = sharded_state.contents(engine._shards(), engine._optimizer.optimizer).values()
    tensors = {name: tensor for part, _ in parts for name, tensor in part.items()}
    copies = {name: tensor.detach().to("cpu", copy=True).contiguous() for name, tensor in tensors.items()}
    save_file(copies, folder / f"{engine.rank}.safetensors")


def saving(backend: Any, path: str, folder: Path) -> dict[str, float]:
    """Trains all weights of a model for a step and saves them; returns for this rank in MiB the state that it
    writes, and how far its memory rose while it wrote that at once, by `save_state`, and the exported model
    (`model`)."""
    engine = backend.start("fp32", cpu=True)
    trained(engine, Full(), path, steps=1)
    found = {"state": engine.state_size() / 2**20}
    with Watch() as watch:
        if found["state"]:
            save_all_at_once(engine, folder)
    found["at once"] = watch.peak
    with Watch() as watch:
        engine.save_state(folder / "state")
    found["save_state"] = watch.peak
    engine.barrier()
    with Watch() as watch:
        weights = engine.full_state()
        if engine.is_main:
            save_final(engine.model, CausalLM(path).tokenizer(), folder / "model", weights)
        del weights
    found["model"] = watch.peak
    engine.close()
    return found


def savings(cases: dict[str, Any], first: str, path: str, folder: Path) -> dict[str, dict[str, float]]:
    """Returns `saving` of each backend; each has saved the model in `first` before, so that all imports are
    done."""
    torch.set_num_threads(1)
    give_back_what_is_freed()
    for name, backend in cases.items():
        for part in ("first", "big"):
            (folder / part / name).mkdir(parents=True, exist_ok=True)
        saving(backend, first, folder / "first" / name)
    return {name: saving(backend, path, folder / "big" / name) for name, backend in cases.items()}
