"""The devices that a run is planned for: GPUs by name or by the size of their memory, those that are visible,
and this machine's CPU."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from mft.config.schema import resolve_precision
from mft.errors import UserError, nearest, shortened
from mft.hardware import AMPERE, gpus, machine_memory
from mft.training.settings import Precision

GIB = 2**30


@dataclass(frozen=True)
class Card:
    """A GPU as its vendor's data sheet has it."""

    gib: float
    """Memory as the driver shows it, with ECC on where the GPU has it."""
    tflops: float
    """Dense matrix products in bf16, in fp16 where it has no bf16."""
    link: float
    """GB/s to the other GPUs of a machine, one way: NVLink, else PCIe."""
    bf16: bool = True
    """Whether it computes in bf16."""


CARDS = {
    "T4": Card(14.6, 65, 12, bf16=False),
    "V100-16": Card(15.8, 125, 150, bf16=False),
    "V100-32": Card(31.7, 125, 150, bf16=False),
    "A10": Card(22.2, 125, 25),
    "A10G": Card(22.2, 70, 25),
    "L4": Card(22.0, 121, 25),
    "3090": Card(23.6, 71, 25),
    "4090": Card(23.5, 165, 25),
    "5090": Card(31.4, 210, 50),
    "A6000": Card(47.4, 155, 25),
    "L40": Card(44.4, 181, 25),
    "L40S": Card(44.4, 362, 25),
    "A100-40": Card(39.4, 312, 300),
    "A100-80": Card(79.2, 312, 300),
    "H100": Card(79.1, 989, 450),
    "H100-PCIE": Card(79.1, 756, 50),
    "H100-NVL": Card(93.1, 835, 300),
    "H200": Card(139.8, 989, 450),
    "B200": Card(178.4, 2250, 900),
}
"""Name → data."""

KINDS = {
    frozenset(word for word in name.split("-") if word == name or not word.isdigit()): card
    for name, card in CARDS.items()
}
"""Words of a name without the size of the memory → data, which but for that is the same."""

COMMON = ("4090", "A100-40", "L40S", "H100", "H200")
"""What is compared where no GPU is visible and none is asked for."""

REFERENCE = "A100-80"
"""Stands for a GPU of which only the memory is given."""

CPU = "cpu"

SIZE = re.compile(r"(\d+(?:\.\d+)?) ?g(?:i?b)?", re.IGNORECASE)
COUNTED = re.compile(r"(\d+) ?[x*] ?(.+)", re.IGNORECASE)
MAKERS = re.compile(r"^(nvidia|geforce|tesla|rtx|[ _-])+", re.IGNORECASE)


@dataclass(frozen=True)
class Device:
    """What one rank computes on."""

    name: str
    """As it was asked for, or as the driver calls it."""
    memory: float
    """Bytes of one GPU; of a CPU those that all ranks of the machine share."""
    count: int | None = None
    """GPUs of a machine, each with a rank; None: as many as launch.nproc says."""
    card: Card | None = None
    """What its speed is taken from, None: nothing is known of it."""
    bf16: bool = True
    """Whether it computes in bf16."""
    visible: bool = False
    """Whether it is a GPU of this machine."""

    @property
    def kind(self) -> str:
        """As torch calls it: cuda or cpu."""
        return "cpu" if self.name == CPU else "cuda"

    @property
    def shown(self) -> str:
        """Its name with the number of them."""
        return f"{self.count} x {self.name}" if self.count and self.count > 1 else self.name

    def precision(self, setting: Precision | str) -> Precision:
        """Returns train.precision as it is there: auto is bf16, else fp16, on a CPU what this one has."""
        if setting != Precision.auto:
            return Precision(setting)
        if self.kind == "cpu":
            return resolve_precision(Precision.auto)
        return Precision.bf16 if self.bf16 else Precision.fp16


def devices(words: Sequence[str]) -> list[Device]:
    """Returns the devices that were asked for; without any those that are visible, or else common ones.

    words: values of --gpu, each one or several, as in H100,8x80GiB or [4090,cpu]. Raises UserError for what
    is no name.
    """
    names = [name.strip() for word in words for name in word.strip("[] ").split(",")]
    found = dict.fromkeys(device(name) for name in names)
    return list(found) or visible() or [device(name) for name in COMMON]


def device(text: str) -> Device:
    """Returns the device of a name such as H100, 80GiB, 8xA100-80 or cpu; UserError with the nearest name."""
    counted = COUNTED.fullmatch(text)
    count, name = (int(counted[1]), counted[2]) if counted else (None, text)
    if count is not None and not 1 <= count <= 1024:
        raise _refused(text, "a machine has 1 to 1,024 of them")
    if name.lower() == CPU:
        if count is not None:
            raise _refused(text, "a machine has one; launch.nproc is the number of its ranks")
        return Device(CPU, machine_memory())
    if size := SIZE.fullmatch(name):
        if not 1 <= float(size[1]) <= 2**20:
            raise _refused(text, "1 GiB to 1,048,576 GiB can be planned for")
        return Device(f"{size[1]}GiB", float(size[1]) * GIB, count, CARDS[REFERENCE])
    plain = MAKERS.sub("", name).upper().replace("_", "-").replace(" ", "-")
    if card := CARDS.get(plain):
        return Device(plain, card.gib * GIB, count, card, card.bf16)
    if sizes := [known for known in CARDS if plain and known.startswith(f"{plain}-")]:
        raise _refused(text, f"it is made with several sizes of memory; choose {' or '.join(sizes)}")
    meant = f"{name}GiB" if name.isdigit() else ""
    raise _refused(text, f"unknown GPU; did you mean {meant}?" if meant else "unknown GPU", plain)


def visible() -> list[Device]:
    """Returns the GPUs that CUDA shows, as one device of the smallest memory among them; [] without any."""
    if not (found := gpus()):
        return []
    least = min(found, key=lambda gpu: gpu.memory)
    amd = least.capability == (0, 0)
    bf16 = amd or min(gpu.capability for gpu in found) >= AMPERE
    name, memory = least.name or "GPU", float(least.memory)
    return [Device(name, memory, len(found), card_of(least.name), bf16, visible=True)]


def card_of(name: str) -> Card | None:
    """Returns what is known of a GPU by the name that its driver has for it, e.g. NVIDIA A100-SXM4-80GB."""
    words = set(re.split(r"[^A-Z0-9]+", name.upper()))
    found = [(len(kind), card) for kind, card in KINDS.items() if kind <= words]
    return max(found, key=lambda each: each[0], default=(0, None))[1]


def _refused(text: str, why: str, name: str = "") -> UserError:
    hint = nearest(name, CARDS) if name and "did you mean" not in why else ""
    allowed = f"{', '.join(CARDS)}, cpu, or a size such as 80GiB; 8x in front for eight in a machine"
    return UserError(
        f"plan.gpu={shortened(text)[1:-1]}: {why}{hint or '.' * ('?' not in why)} Allowed: {allowed}."
    )
