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
    """Memory as CUDA shows it to a process, with ECC on where the GPU has it: 1 to 8% less than on its box."""
    tflops: float
    """Dense matrix products in bf16 (in fp16 where it has no bf16), summed up in float32."""
    link: float
    """GB/s to the other GPUs of a machine, one way: NVLink, else PCIe."""
    bf16: bool = True
    """Whether it computes in bf16."""


CARDS = {
    "T4": Card(14.6, 65, 12, bf16=False),
    "V100-16": Card(15.8, 125, 150, bf16=False),
    "V100-32": Card(31.7, 125, 150, bf16=False),
    "A10": Card(22.0, 125, 25),
    "A10G": Card(22.0, 70, 25),
    "A30": Card(23.5, 165, 25),
    "L4": Card(22.0, 121, 25),
    "3090": Card(23.6, 71, 25),
    "4090": Card(23.5, 165, 25),
    "5090": Card(31.4, 210, 50),
    "A40": Card(44.3, 150, 25),
    "A6000": Card(47.4, 155, 25),
    "6000-ADA": Card(47.4, 364, 25),
    "PRO-6000": Card(94.9, 504, 50),
    "L40": Card(44.4, 181, 25),
    "L40S": Card(44.4, 362, 25),
    "A100-40": Card(39.4, 312, 300),
    "A100-80": Card(79.1, 312, 300),
    "H20": Card(95.0, 148, 450),
    "H100": Card(79.1, 989, 450),
    "H100-PCIE": Card(79.1, 756, 50),
    "H100-NVL": Card(93.1, 835, 300),
    "H200": Card(139.8, 989, 450),
    "GH200": Card(94.5, 989, 450),
    "B200": Card(178.3, 2250, 900),
    "MI300X": Card(191.5, 1307, 400),
}
"""Name → data."""

BESIDE = {
    "NVIDIA",
    "GEFORCE",
    "TESLA",
    "QUADRO",
    "RTX",
    "AMD",
    "INSTINCT",
    "SXM",
    "SXM2",
    "SXM3",
    "SXM4",
    "SXM5",
    "PCIE",
    "HBM2",
    "HBM2E",
    "HBM3",
    "HBM3E",
    "GENERATION",
    "BLACKWELL",
    "WORKSTATION",
    "SERVER",
    "EDITION",
}
"""Words of a driver's names that change none of the numbers."""

MIG = re.compile(r"[ :-]*(?:MIG)?[ :-]*(\d)G\.(\d+)GB(\+ME|\+GFX)*$", re.IGNORECASE)
"""A slice of a GPU: its part of the computing, of SLICES, and its memory."""

SLICES = 7
"""That an A100, H100, H200 or B200 is cut into."""

OF_A_SLICE = 0.95
"""Share of the memory in its name that a slice has at least (a 1g.5gb 4.75 GiB, a 3g.40gb 39.3)."""

PCIE = 25.0
"""GB/s of what has no NVLink."""

COMMON = ("4090", "A100-40", "L40S", "H100", "H200")
"""What is compared where no GPU is visible and none is asked for."""

REFERENCE = "A100-80"
"""Stands for a GPU of which only the memory is given."""

CPU = "cpu"

SIZE = re.compile(r"(\d+(?:\.\d+)?) ?g(?:i?b)?", re.IGNORECASE)
LARGEST = 2**20
"""GiB of a device or a machine at most."""

COUNTED = re.compile(r"(\d+) ?[x*] ?(.+)", re.IGNORECASE)


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
        if not 1 <= float(size[1]) <= LARGEST:
            raise _refused(text, f"1 GiB to {LARGEST:,} GiB can be planned for")
        return Device(f"{size[1]}GiB", float(size[1]) * GIB, count, CARDS[REFERENCE])
    if found := _known(name):
        plain, card = found
        return Device(plain, card.gib * GIB, count, card, card.bf16)
    if (
        _known(name, any_size=True)
        and (words := _words(name) - BESIDE)
        and (sizes := [known for known in CARDS if words < _words(known)])
    ):
        raise _refused(text, f"it is made with several sizes of memory; choose {' or '.join(sizes)}")
    meant = f"{name}GiB" if name.isdigit() else ""
    raise _refused(text, f"unknown GPU; did you mean {meant}?" if meant else "unknown GPU", name)


def host_memory(text: str) -> float:
    """Returns the bytes of a machine's memory such as 512GiB; UserError for what is no size."""
    size = SIZE.fullmatch(text.strip())
    if not size or not 1 <= float(size[1]) <= LARGEST:
        hint = f"; did you mean {text}GiB?" if text.isdigit() else "."
        raise UserError(
            f"plan.host={shortened(text)[1:-1]}: no size of memory{hint} Allowed: 1GiB to {LARGEST}GiB."
        )
    return float(size[1]) * GIB


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
    found = _known(name, any_size=True)
    return found[1] if found else None


def _known(text: str, any_size: bool = False) -> tuple[str, Card] | None:
    """Returns name and data of a GPU, or of a slice of one, as people and drivers write it; None for any other.

    any_size: whether its memory may be another one, or left open.
    """
    if part := MIG.search(text):
        if not (whole := _known(text[: part.start()], any_size=True)):
            return None
        share, gib = int(part[1]) / SLICES, int(part[2])
        if not 0 < share <= 1 or gib > 1.1 * max(card.gib for card in _kind(whole[0])):
            return None
        name = f"{whole[0]}-{part[1]}g.{gib}gb"
        return name, Card(OF_A_SLICE * gib, share * whole[1].tflops, PCIE, whole[1].bf16)
    words, found = _words(text), []
    for name, card in CARDS.items():
        own = {word for word in _words(name) if not (any_size and _is_size(word, card))}
        sizes = {word for word in words - own if _is_size(word, card) or (any_size and word.isdigit())}
        if own <= words and words - own - sizes <= BESIDE:
            found.append((len(_words(name) & words), name, card))
    return max(found, key=lambda each: each[0])[1:] if found else None


def _kind(name: str) -> list[Card]:
    """Returns the GPUs that a name stands for but for the size of the memory."""
    return [card for known, card in CARDS.items() if known.partition("-")[0] == name.partition("-")[0]]


def _words(name: str) -> set[str]:
    """Returns the words of a GPU's name, that of its memory without its unit: 80GB is 80."""
    words = re.split(r"[^A-Z0-9]+", name.upper())
    return {re.sub(r"^(\d+)(G|GB|GIB)$", r"\1", word) for word in words if word}


def _is_size(word: str, card: Card) -> bool:
    """Whether a word is the GB of memory that a GPU is sold with."""
    return word.isdigit() and int(word) > 0 and 0.9 <= card.gib / int(word) <= 1.0


def _refused(text: str, why: str, name: str = "") -> UserError:
    hint = nearest(name, CARDS) if name and "did you mean" not in why else ""
    allowed = f"{', '.join(CARDS)}, cpu, or a size such as 80GiB; 8x in front for eight in a machine"
    return UserError(
        f"plan.gpu={shortened(text)[1:-1]}: {why}{hint or '.' * ('?' not in why)} Allowed: {allowed}."
    )
