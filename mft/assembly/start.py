"""How a run starts: its config as objects, its tokenised data, and the engine of this rank."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from omegaconf import DictConfig

from mft.config import build, identity, inputs, schema
from mft.data import datasets
from mft.data.settings import DataSettings
from mft.distributed.determinism import compute_deterministically
from mft.distributed.engine import Engine
from mft.estimate.skeletons import Skeletons
from mft.training.phases import Phases
from mft.training.progress import Terminal
from mft.training.settings import TrainSettings


@dataclass(frozen=True)
class Run:
    """What all steps of a run work with."""

    cfg: DictConfig
    folder: Path
    parts: build.Components
    settings: TrainSettings
    data_settings: DataSettings
    data: datasets.Dataset
    engine: Engine
    progress: Terminal
    first_here: bool
    """Whether this is the first rank of its machine: it tokenises and checks for all."""
    phases: Phases = field(default_factory=Phases)
    skeletons: Skeletons = field(default_factory=Skeletons)
    """Models without weights, of which its memory is estimated."""


def start(cfg: DictConfig, folder: Path, phases: Phases) -> Run:
    """Reads, or tokenises, the data, then starts the engine; UserError where the data has changed.

    In this order: the ranks that wait for the tokens would wait in a collective otherwise, and time out.
    """
    parts = build.build_components(cfg)
    parts.dist.meet()
    settings, data_settings = schema.settings_of(cfg)
    first = os.environ.get("LOCAL_RANK", "0") == "0"  # of this machine; no process group says it yet
    data = read_data(cfg, parts, data_settings, first)
    require_unchanged(cfg, folder, parts, data.fingerprints)
    compute_deterministically(settings.deterministic)
    engine = parts.dist.start(settings.precision.value)
    phases.measure(engine.device)
    progress = Terminal(data.names, quiet=not engine.is_main)
    return Run(cfg, folder, parts, settings, data_settings, data, engine, progress, first, phases)


def read_data(
    cfg: DictConfig, parts: build.Components, settings: DataSettings, first_here: bool = True
) -> datasets.Dataset:
    """Returns the tokenised data of a run. first_here: see `Run`."""
    tokenizer, splits = parts.model.tokenizer(), parts.rows.splits_samples
    return datasets.dataset(parts.named_tasks, settings, tokenizer, cfg.cache_dir, splits, first_here)


def require_unchanged(
    cfg: DictConfig, folder: Path, parts: build.Components, of_tasks: Mapping[str, str] | None = None
) -> None:
    """Raises UserError where what was read is not what the folder's identity records.

    of_tasks: fingerprints of the tasks as they were read; the other files are hashed here. It is called after
    each reading, since files may change between the check of a run, or of a sweep, and its start.
    """
    if recorded := identity.identity_of(folder):
        of_files = inputs.files(cfg, parts.model, parts.peft)
        recorded.require({**(of_tasks or {}), **of_files}, schema.plain(cfg))
