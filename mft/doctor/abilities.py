"""What can run here: what child processes answered, as findings with the cure."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from mft.doctor import children
from mft.doctor.finding import Finding, Part
from mft.doctor.needs import ALWAYS, Needs
from mft.hardware import has_gpu

GIB = 2**30
CLOCKS = 5.0
"""Seconds by which the clock of a server may differ; the header of an answer is exact to one."""

GROUPS = (
    ("devices", *ALWAYS, "flash-attn", "fsdp", "4 bits", "8 bits", "adamw8bit"),
    ("gloo", "deepspeed", "nccl", "mlflow"),
)
"""Attempts by the child that makes them one after the other: the children run side by side."""

SHOWN = {
    "4 bits": "4 bits (NF4)",
    "fsdp": "FSDP2",
    "deepspeed": "DeepSpeed",
    "gloo": "gloo, fork server",
    "nccl": "NCCL",
    "mlflow": "tracker",
}
"""Names in the report where they differ."""

CURES = {
    **{name: f"pip install --force-reinstall {name}" for name in ALWAYS},
    "devices": "install a build of torch for this driver (pytorch.org); see CUDA_VISIBLE_DEVICES",
    "4 bits": "pip install --upgrade bitsandbytes; or peft=lora",
    "8 bits": "pip install --upgrade bitsandbytes; or peft.bits=4, peft=lora",
    "adamw8bit": "optimizer=adamw",
    "flash-attn": "pip install 'mft[flash]'; or model.attention=auto",
    "deepspeed": "pip install --upgrade deepspeed; or dist=fsdp, ddp",
    "fsdp": "dist=ddp, zero2",
    "gloo": "allow connections over 127.0.0.1; or launch=inline with one rank",
    "nccl": "NCCL_DEBUG=INFO tells more; or launch.nproc=1",
    "mlflow": "training goes on without it, and `mft tracking sync` sends what it missed",
}

works = Part("abilities")


def findings(needs: Needs, tracker: str = "", patience: float = children.LIMIT) -> Iterator[Finding]:
    """Yields what can run here, each as soon as it was tried.

    needs: what the config needs of it; tracker: address of the MLflow store to ask, "" for none; patience:
    seconds of one attempt.
    """
    given: dict[str, Mapping[str, Any]] = {"mlflow": {"uri": tracker}} if tracker else {}
    left_out = set() if tracker else {"mlflow"}
    if not has_gpu():
        left_out.add("nccl")
        yield _worse("nccl", "there is no GPU", "none is needed on CPUs, which use gloo", needs)
    done: queue.Queue[children.Answer | None] = queue.Queue()

    def ask(names: Sequence[str]) -> None:
        for answer in children.answers(names, given, patience):
            done.put(answer)
        done.put(None)

    groups = [[name for name in group if name not in left_out] for group in GROUPS]
    for group in groups:
        threading.Thread(target=ask, args=(group,), daemon=True).start()
    running = len(groups)
    while running:
        answer = done.get()
        if answer is None:
            running -= 1
        else:
            yield from judged(answer, needs)


def judged(answer: children.Answer, needs: Needs) -> Iterator[Finding]:
    """Yields what an answer of a child means: `found` as it was read, or `error`."""
    name = str(answer["name"])
    if "error" in answer:
        yield _worse(name, str(answer["error"]), CURES[name], needs)
    elif reader := READERS.get(name):
        yield from reader(answer["found"], needs)
    elif name not in ALWAYS:  # a library that imports is no news beside its version
        yield works.ok(_shown(name), WORDS.get(name, "was tried, works") + _where(answer["found"]))


WORDS = {
    "gloo": "two ranks from the fork server added up a number over the loopback",
    "nccl": "ranks on GPUs added up a number",
    "fsdp": "a divided layer was trained",
    "4 bits": "a packed layer computes, forward and backward",
    "8 bits": "a packed layer computes, forward and backward",
    "adamw8bit": "updated a matrix",
}


def _where(found: Mapping[str, Any]) -> str:
    device = found.get("device")
    return f" (on the {'GPU' if device == 'cuda' else 'CPU'})" if device else ""


def _shown(name: str) -> str:
    return SHOWN.get(name, name)


def _worse(name: str, found: str, cure: str, needs: Needs) -> Finding:
    """Returns a problem where the config needs an ability, a note where not."""
    reason = needs.of(name) or (needs.of("fork server") if name == "gloo" else "")
    # Of a machine without a GPU nobody expects NCCL.
    if not reason or (name == "nccl" and found == "there is no GPU"):
        return works.note(_shown(name), found, cure)
    return works.problem(_shown(name), f"{found}; needed by {reason}", cure)


def _devices(found: Mapping[str, Any], needs: Needs) -> Iterator[Finding]:
    build, gpus = found["build"], found["gpus"]
    shown = f"torch is built for {f'CUDA {build}' if build[:1].isdigit() else build or 'CPUs'}"
    for number, gpu in enumerate(gpus):
        memory = f"{gpu['memory'] / GIB:,.0f} GiB"
        yield works.ok(f"GPU {number}", f"{gpu['name']}, {memory}, compute capability {gpu['capability']}")
    if gpus:
        yield works.ok("devices", f"{shown}, driver {driver() or 'unknown'}")
    elif has_gpu():
        found_ = f"{shown}; a driver is here ({driver() or 'version unknown'}), but torch sees no GPU"
        yield works.problem("devices", found_, CURES["devices"])
    else:
        yield works.note("devices", f"{shown}; no GPU driver is here, so everything runs on the CPU")
    on = "the GPU" if gpus else "the CPU"
    if found["bf16"]:
        yield works.ok("bf16", f"{on} computes in it")
    else:
        slow = "has no such arithmetic" if gpus else "emulates it, several times slower than fp32"
        state = works.problem if gpus and needs.of("bf16") else works.note
        yield state("bf16", f"{on} {slow}", "train.precision=auto chooses what is fast here")
    if gpus:
        yield works.ok("fp16", f"{on} computes in it")
    else:
        yield _worse("fp16", "needs a GPU", "train.precision=bf16 or fp32", needs)


def driver() -> str:
    """Returns the version of NVIDIA's driver, "" where it is not there or does not say."""
    try:
        text = Path("/proc/driver/nvidia/version").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""
    words = text.partition("Kernel Module")[2].split()
    return next((word for word in words if word[:1].isdigit()), "")


def _flash(found: Mapping[str, Any], needs: Needs) -> Iterator[Finding]:
    if reason := found.get("reason"):
        yield _worse("flash-attn", f"cannot run: {reason}", CURES["flash-attn"], needs)
    else:
        yield works.ok("flash-attn", "computed an attention on the GPU")


def _deepspeed(found: Mapping[str, Any], needs: Needs) -> Iterator[Finding]:
    gpus = has_gpu()
    lacking = [name for name in ("compiler", "ninja") if not found[name]]
    if gpus and not found["cuda_home"]:
        lacking.append("CUDA_HOME")
    if lacking:
        names = {"compiler": "a C++ compiler", "ninja": "ninja", "CUDA_HOME": "CUDA_HOME (nvcc)"}
        said = " and ".join(names[name] for name in lacking)
        cure = "install them: apt install g++, pip install ninja; CUDA_HOME names the CUDA toolkit"
        # On GPUs nothing is compiled unless dist.config asks for an op of DeepSpeed's own.
        state = works.note if gpus else None
        found_ = f"imports; its ops cannot be compiled without {said}"
        yield state("DeepSpeed", found_, cure) if state else _worse("deepspeed", found_, cure, needs)
        return
    home = f", CUDA_HOME={found['cuda_home']}" if found["cuda_home"] else ""
    yield works.ok("DeepSpeed", f"imports; its ops are compiled with {found['compiler']} and ninja{home}")


def _tracker(found: Mapping[str, Any], needs: Needs) -> Iterator[Finding]:
    skew = found["skew"]
    if skew is not None and abs(skew) > CLOCKS:
        ahead = "ahead of" if skew > 0 else "behind"
        cure = "set both clocks by NTP: the times of points would mislead"
        yield works.note("tracker", f"answers; its clock is {abs(skew):,.0f} s {ahead} this machine's", cure)
    else:
        clock = "" if skew is None else ", its clock agrees"
        yield works.ok("tracker", f"the store answers and accepts the credentials{clock}")


READERS: dict[str, Callable[[Mapping[str, Any], Needs], Iterator[Finding]]] = {
    "devices": _devices,
    "flash-attn": _flash,
    "deepspeed": _deepspeed,
    "mlflow": _tracker,
}
