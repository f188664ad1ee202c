"""The child process of the doctor: tries what its command line names, and answers each with a line of JSON.

`python -m mft.doctor.attempt NAME …`, arguments of the attempts as JSON on standard input. An attempt returns
what it found, or raises; a library that crashes or hangs takes this process with it, never the doctor.
"""

from __future__ import annotations

import importlib
import json
import shutil
import sys
import tempfile
import time
from collections.abc import Callable
from email.utils import parsedate_to_datetime
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from mft.errors import UserError
from mft.hardware import visible_gpus

MARK = "mft-doctor:"
"""Begins a line that is an answer: libraries print lines, too."""


def imported(name: str) -> dict[str, Any]:
    importlib.import_module(name)
    return {}


def devices() -> dict[str, Any]:
    """Returns the CUDA build of torch and the GPUs that it sees, with memory in bytes."""
    import torch

    from mft.hardware import computes_in_bf16

    count = torch.cuda.device_count()
    seen = [torch.cuda.get_device_properties(index) for index in range(count)]
    gpus = [
        {"name": gpu.name, "memory": gpu.total_memory, "capability": f"{gpu.major}.{gpu.minor}"}
        for gpu in seen
    ]
    build = torch.version.cuda or (f"ROCm {torch.version.hip}" if torch.version.hip else "")
    return {"build": build, "gpus": gpus, "bf16": computes_in_bf16()}


def quantised(bits: int) -> dict[str, Any]:
    """Packs a tiny layer of bitsandbytes to 4 or 8 bits and computes with it, forward and backward."""
    import torch

    from mft.hardware import quiet_without_gpu

    quiet_without_gpu()
    from bitsandbytes import nn

    device = "cuda" if torch.cuda.is_available() else "cpu"
    kinds: dict[int, Callable[[], Any]] = {}
    kinds[4] = lambda: nn.Linear4bit(64, 64, bias=False, compute_dtype=torch.float32, quant_type="nf4")
    kinds[8] = lambda: nn.Linear8bitLt(64, 64, bias=False, has_fp16_weights=False)
    layer = kinds[bits]().to(device)
    x = torch.randn(4, 64, device=device, requires_grad=True, dtype=torch.float16 if bits == 8 else None)
    y = layer(x)
    y.float().sum().backward()
    assert torch.isfinite(y).all() and x.grad is not None
    return {"device": device}


def adamw8bit() -> dict[str, Any]:
    """Updates a tiny matrix with the 8-bit optimizer."""
    import torch

    from mft.optim.optimizers import AdamW8bit

    device = "cuda" if torch.cuda.is_available() else "cpu"
    weight = torch.nn.Parameter(torch.ones(64, 128, device=device))
    optimizer = AdamW8bit().build([("weight", weight)], 0.1)
    weight.sum().backward()
    optimizer.step()
    assert torch.isfinite(weight).all() and float(weight[0, 0].detach()) < 1
    return {"device": device}


def flash() -> dict[str, Any]:
    """Computes an attention of flash-attn, where it can run at all."""
    from mft.model.attention_kernel import Facts, unavailable_reason

    if reason := unavailable_reason(Facts.here()):
        return {"reason": reason}
    import torch
    from flash_attn import flash_attn_func

    q = torch.randn(1, 16, 2, 64, device="cuda", dtype=torch.float16)
    assert torch.isfinite(flash_attn_func(q, q, q, causal=True)).all()
    return {}


def deepspeed() -> dict[str, Any]:
    """Imports DeepSpeed, and returns what it could compile its ops with."""
    from torch.utils.cpp_extension import CUDA_HOME, get_cxx_compiler, is_ninja_available

    from mft.hardware import quiet_without_gpu

    quiet_without_gpu()
    importlib.import_module("deepspeed")
    compiler = shutil.which(get_cxx_compiler()) or ""
    return {"compiler": compiler, "ninja": is_ninja_available(), "cuda_home": CUDA_HOME or ""}


def fsdp() -> dict[str, Any]:
    """Trains a tiny layer divided by FSDP2, in a group of one rank."""
    import torch
    from torch.distributed.fsdp import fully_shard

    from mft.distributed.fsdp import Fsdp

    engine = Fsdp().start("fp32")
    layer = torch.nn.Linear(8, 8).to(engine.device)
    fully_shard(layer, **Fsdp().options("no", engine.device))
    layer(torch.ones(2, 8, device=engine.device)).sum().backward()
    engine.close()
    return {"device": engine.device.type}


def ranks(backend: str, count: int) -> dict[str, Any]:
    """Starts ranks as a run does, from the fork server, and lets them add up their numbers."""
    from mft.launch.spawn import spawn, start_fork_server

    start_fork_server(("mft.launch.worker", "torch"))  # a run imports more, which is not what is tried here
    with tempfile.TemporaryDirectory() as folder:
        sums = spawn(add_up, (backend,), count, Path(folder), shutdown_seconds=5)
    assert sums == dict.fromkeys(range(count), count * (count + 1) / 2), f"the ranks added up to {sums}"
    return {}


def add_up(backend: str) -> float:
    """Returns the sum of rank + 1 over all ranks, by an all_reduce. Runs in a rank."""
    import torch
    from torch import distributed

    distributed.init_process_group(backend)
    rank = distributed.get_rank()
    device = f"cuda:{rank}" if backend == "nccl" else "cpu"
    number = torch.tensor(rank + 1.0, device=device)
    distributed.all_reduce(number)
    total = float(number)
    distributed.destroy_process_group()
    return total


def tracker(uri: str) -> dict[str, Any]:
    """Asks an MLflow store for its experiments; returns how far its clock is ahead, in seconds."""
    from mft.tracking.store import client_for, reason

    skew = None
    try:
        if uri.startswith("http"):
            import requests

            sent = time.time()
            answer = requests.get(f"{uri}/health", timeout=5)
            if date := answer.headers.get("Date"):
                skew = parsedate_to_datetime(date).timestamp() - (sent + time.time()) / 2
        client_for(uri).search_experiments(max_results=1)
    except Exception as error:
        # MLflow's words hold the host, which is nobody's business in a report.
        host = urlsplit(uri).hostname if "://" in uri else None
        raise UserError(reason(error, uri, host or "")) from None
    return {"skew": skew}


ATTEMPTS: dict[str, Callable[..., dict[str, Any]]] = {
    "devices": devices,
    "4 bits": lambda: quantised(4),
    "8 bits": lambda: quantised(8),
    "adamw8bit": adamw8bit,
    "flash-attn": flash,
    "deepspeed": deepspeed,
    "fsdp": fsdp,
    "gloo": lambda: ranks("gloo", 2),
    "nccl": lambda: ranks("nccl", min(2, visible_gpus())),
    "mlflow": tracker,
}
"""Name → what is tried. Any other name is a module to import."""


def main(names: list[str]) -> None:
    """Answers each name in turn: {"name": …, "found": {…}} or {"name": …, "error": …}."""
    given = json.load(sys.stdin)
    for name in names:
        attempt = ATTEMPTS.get(name)
        try:
            found = attempt(**given.get(name, {})) if attempt else imported(name)
            answer = {"name": name, "found": found}
        except BaseException as error:
            text = " ".join(str(error).split())
            text = text if isinstance(error, UserError) else f"{type(error).__name__}: {text}"
            answer = {"name": name, "error": text[:600]}
        print(f"\n{MARK}{json.dumps(answer)}", flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
