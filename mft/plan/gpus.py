"""The devices that a run is planned for: GPUs by name or by the size of their memory, those that are visible,
and this machine's CPU."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from mft.cards import BESIDE, CARDS, Card, card_of, known, words_of
from mft.config.schema import resolve_precision
from mft.errors import UserError, nearest, shortened
from mft.hardware import AMPERE, gpus, machine_memory
from mft.training.settings import Precision

GIB = 2**30

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
    if found := known(name):
        plain, card = found
        return Device(plain, card.gib * GIB, count, card, card.bf16)
    if (
        known(name, any_size=True)
        and (words := words_of(name) - BESIDE)
        and (sizes := [card for card in CARDS if words < words_of(card)])
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


def _refused(text: str, why: str, name: str = "") -> UserError:
    hint = nearest(name, CARDS) if name and "did you mean" not in why else ""
    allowed = f"{', '.join(CARDS)}, cpu, or a size such as 80GiB; 8x in front for eight in a machine"
    return UserError(
        f"plan.gpu={shortened(text)[1:-1]}: {why}{hint or '.' * ('?' not in why)} Allowed: {allowed}."
    )
