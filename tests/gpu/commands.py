"""The command line as a person types it: exit codes and what is said (A8 to A11)."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from mft.files.json_file import read_json
from mft.launch.signals import SAVED
from tests.distributed.runs import logged
from tests.gpu.children import Cell, Found, Place
from tests.gpu.runs import ASKED, Case, apart, data, played, prompts
from tests.gpu.trained import answers

SETTINGS = (
    "model=tiny",
    "tracking=[]",
    "train.sample_losses=none",
    "train.eval_every=null",
    "train.log_every=1",
)


OURS = ("DS_ACCELERATOR", "PYTORCH_NVML_BASED_CUDA_CHECK", "PYTORCH_CUDA_ALLOC_CONF")
"""Variables that the parent of all cells has set and no person would."""


def overrides(place: Place) -> list[str]:
    """Returns what every command is given."""
    paths = f"data.paths=[{','.join(map(str, data(place)[:2]))}]"
    return [*SETTINGS, paths, "data.seq_length=128", "data=pack", "train.per_device_batch_size=1"]


def started(place: Place, words: list[str], variables: dict[str, str] | None = None) -> subprocess.Popen[str]:
    """Starts `mft` in the folder of all runs."""
    work = place.folder / "commands"
    work.mkdir(exist_ok=True)
    root = str(Path(__file__).parent.parent.parent)
    env = {name: value for name, value in os.environ.items() if name not in OURS} | {
        "MFT_CACHE": str(place.folder / "cache"),
        "PYTHONPATH": f"{root}:{os.environ.get('PYTHONPATH', '')}",
    }
    env |= variables or {}
    command = [sys.executable, "-m", "mft.cli", *words]
    return subprocess.Popen(
        command, cwd=work, env=env, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    )


@dataclass(frozen=True)
class Command:
    """A command, its exit code and a part of what it says."""

    words: tuple[str, ...]
    code: int = 0
    said: str = ""
    variables: dict[str, str] = field(default_factory=dict)
    gpu: bool = True
    """Whether it trains on the GPU, where the place has one."""

    def run(self, place: Place) -> Found:
        """Runs it to its end."""
        began = time.perf_counter()
        verb, *words = self.words
        folder = place.folder / "commands" / f"{abs(hash(self.words))}"
        words = [*overrides(place), *words, *([] if "-m" in words else [f"output_dir={folder}"])]
        process = started(place, [verb, *words], self.variables)
        said = process.communicate(timeout=600)[0]
        found = Found({"code": process.returncode, "seconds": round(time.perf_counter() - began, 1)})
        found.holds(process.returncode == self.code, f"exit code {self.code} was expected")
        found.holds(self.said in said, f"{self.said!r} was not said")
        if found.missed:
            found.values["said"] = said[-1500:]
        elif self.code == 0 and "-m" not in words:
            rows = (folder / "log" / "rank0.log").read_text() + said
            device = "cuda" if self.gpu and place.device == "cuda" else "cpu"
            found.holds(f"on {device}" in rows, f"it has not trained on {device}")
        return found


SHORT = ("train", "train.max_steps=2")
COMMANDS = {
    "auto": Command(SHORT),
    "sweep": Command(("train", "-m", "train.max_steps=2", "train.seed=1,2")),
    "inline zero3": Command((*SHORT, "dist=zero3", "launch=inline")),
    "two ranks of single": Command((*SHORT, "dist=single", "launch.nproc=2"), 2, "choose dist=ddp"),
    "no GPU visible": Command(SHORT, variables={"CUDA_VISIBLE_DEVICES": ""}, gpu=False),
}


def by_uuid(place: Place) -> Found:
    """A GPU that is named by its UUID is used."""
    told = subprocess.run(
        ["nvidia-smi", "-L"], capture_output=True, text=True, check=True, timeout=300
    ).stdout
    uuid = told.split("UUID: ")[1].split(")")[0]
    return Command(SHORT, variables={"CUDA_VISIBLE_DEVICES": uuid}).run(place)


def signalled(place: Place) -> Found:
    """SIGTERM saves and ends with 75; the same command goes on, and nothing of it is left on the GPU."""
    folder = place.folder / "commands" / "signalled"
    words = [
        "train",
        *overrides(place),
        f"output_dir={folder}",
        "train.max_steps=400",
        "train.save_every=null",
    ]
    before = on_gpu(place)
    process = started(place, words)
    while process.poll() is None and not (folder / "metrics.jsonl").exists():
        time.sleep(0.1)
    process.send_signal(signal.SIGTERM)
    said = process.communicate(timeout=600)[0]
    found = Found({"code": process.returncode})
    found.holds(process.returncode == SAVED, f"exit code {SAVED} was expected: {said[-500:]}")
    at = len(logged(folder, "train/loss"))
    again = started(place, [*words, f"train.max_steps={at + 1}"])
    said = again.communicate(timeout=600)[0]
    found.values |= {"stopped after": at, "code of the second": again.returncode}
    found.holds(again.returncode == 0 and "resuming from step-" in said, f"not resumed: {said[-500:]}")
    found.values["left on the GPU"] = left = sorted(on_gpu(place) - before)
    found.holds(not left, "a process is left on the GPU")
    return found


def on_gpu(place: Place) -> set[str]:
    """Returns the processes that nvidia-smi shows, which are ranks: the command itself starts no CUDA."""
    if place.device != "cuda":
        return set()
    command = ["nvidia-smi", "--query-compute-apps=pid", "--format=csv,noheader"]
    return set(subprocess.run(command, capture_output=True, text=True, timeout=300).stdout.split())


def out_of_memory(place: Place) -> Found:
    """A run that does not fit ends in a sentence: all but 1.5 GiB of the GPU are taken, and 130 million weights
    with gradients and optimizer take 2 GiB."""
    import torch

    free, _ = torch.cuda.mem_get_info()
    ballast = torch.empty(free - 3 * 2**29, dtype=torch.uint8, device="cuda")
    sizes = ("model.hidden_size=1024", "model.intermediate_size=4096", "model.layers=8", "peft=full")
    words = (*SHORT, *sizes, "dist=single", "train.precision=fp32")
    found = Command(words, 1, "Memory ran out (CUDA out of memory").run(place)
    found.holds(found.values["seconds"] < 40, "it took long to end")
    del ballast
    return found


def resumed(deterministic: bool, place: Place) -> Found:
    """`mft verify-resume`: three steps and three more after a stop are six, to the bit where kernels are
    deterministic; otherwise that is told, not held."""
    words = ["verify-resume", *overrides(place), "peft=lora", "peft.dropout=0.1", "dist=single,fsdp"]
    words += [
        "launch.nproc=1",
        f"train.deterministic={str(deterministic).lower()}",
        "--at",
        "3",
        "--steps",
        "6",
    ]
    process = started(place, words)
    said = process.communicate(timeout=600)[0]
    found = Found({"code": process.returncode, "said": said[-400:]})
    found.holds(process.returncode == 0 or not deterministic, "not equal to the bit")
    found.holds("2 passed" in said or "failed" in said, f"not verified: {said[-800:]}")
    return found


REFERENCE = Case("full", on_cpu=True, label="asked")


def asked(case: Case, place: Place) -> Case:
    """Returns a case that answers the prompts."""
    return Case(case.peft, case.dist, case.precision, more=prompts(place), label="asked", on_cpu=case.on_cpu)


def answered(dist: str, place: Place) -> Found:
    """The answers before and after training are those of the CPU, token for token in fp32."""
    one, two = (played(asked(case, place), place) for case in (REFERENCE, Case("full", dist)))
    found = Found(apart(one, two) | {"answers": [row[1:3] for row in answers(two)][:1]})
    found.holds(answers(one) == answers(two), f"{answers(one)} are the CPU's, {answers(two)} this one's")
    return found


def reference(place: Place) -> Found:
    """Answers on the CPU."""
    return Found({"answers": len(answers(played(asked(REFERENCE, place), place)))})


def generated(place: Place) -> Found:
    """`mft generate` says the same on GPU and CPU, of a model that has learned too little to end at once."""
    case = Case("full", more=(*prompts(place), "optimizer.lr=1e-12"), label="asked untrained")
    final = str(played(case, place))
    words = ["generate", final, *ASKED[:2], "--do-sample", "false", "--max-new-tokens", "16"]
    said: list[Any] = []
    for variables in ({}, {"CUDA_VISIBLE_DEVICES": ""}):
        process = started(place, words, variables)
        said.append(process.communicate(timeout=600)[0])
    found = Found({"code": process.returncode, "said": said[0][-300:]})
    found.holds(process.returncode == 0, "it failed")
    lines = [line for line in said[0].splitlines() if line.strip() and not line.startswith("──")]
    found.holds(lines, "it has said nothing")
    found.holds(said[0] == said[1], f"the CPU says {said[1][-300:]}")
    status = read_json(Path(final) / "summary.json").text("status")
    found.holds(status == "finished", f"its run is {status}")
    return found


NAME = "reference cpu answers"
RESUMED = [
    Cell("A8 deterministic", partial(resumed, True), 150),
    Cell("A8 as it is", partial(resumed, False), 150),
]
ANSWERED = [
    Cell(NAME, reference, 300, on_cpu=True),
    *(Cell(f"A9 {d}", partial(answered, d), 90, after=(NAME,)) for d in ("single", "fsdp", "zero3")),
    Cell("A9 generate", generated, 90),
]
LINES = [
    *(Cell(f"A10 {name}", command.run, 90) for name, command in COMMANDS.items()),
    Cell("A10 UUID", by_uuid, 90, twin=""),
    Cell("A10 SIGTERM", signalled, 120),
    Cell("A11 out of memory", out_of_memory, 120, twin=""),
]
