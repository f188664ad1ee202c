"""The GPUs that mft knows, by the names that people and drivers have for them.

A plan takes memory and speed from here, and a run the peak that its utilisation is a share of.
"""

from __future__ import annotations

import re
from dataclasses import dataclass


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


def card_of(name: str) -> Card | None:
    """Returns what is known of a GPU by the name that its driver has for it, e.g. NVIDIA A100-SXM4-80GB."""
    found = known(name, any_size=True)
    return found[1] if found else None


def known(text: str, any_size: bool = False) -> tuple[str, Card] | None:
    """Returns name and data of a GPU, or of a slice of one, as people and drivers write it; None for any other.

    any_size: whether its memory may be another one, or left open.
    """
    if part := MIG.search(text):
        if not (whole := known(text[: part.start()], any_size=True)):
            return None
        share, gib = int(part[1]) / SLICES, int(part[2])
        if not 0 < share <= 1 or gib > 1.1 * max(card.gib for card in _kind(whole[0])):
            return None
        name = f"{whole[0]}-{part[1]}g.{gib}gb"
        return name, Card(OF_A_SLICE * gib, share * whole[1].tflops, PCIE, whole[1].bf16)
    words, found = words_of(text), []
    for name, card in CARDS.items():
        own = {word for word in words_of(name) if not (any_size and _is_size(word, card))}
        sizes = {word for word in words - own if _is_size(word, card) or (any_size and word.isdigit())}
        if own <= words and words - own - sizes <= BESIDE:
            found.append((len(words_of(name) & words), name, card))
    return max(found, key=lambda each: each[0])[1:] if found else None


def _kind(name: str) -> list[Card]:
    """Returns the GPUs that a name stands for but for the size of the memory."""
    return [card for each, card in CARDS.items() if each.partition("-")[0] == name.partition("-")[0]]


def words_of(name: str) -> set[str]:
    """Returns the words of a GPU's name, that of its memory without its unit: 80GB is 80."""
    words = re.split(r"[^A-Z0-9]+", name.upper())
    return {re.sub(r"^(\d+)(G|GB|GIB)$", r"\1", word) for word in words if word}


def _is_size(word: str, card: Card) -> bool:
    """Whether a word is the GB of memory that a GPU is sold with."""
    return word.isdigit() and int(word) > 0 and 0.9 <= card.gib / int(word) <= 1.0
