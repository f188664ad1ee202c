"""Composes and checks the jobs of a sweep, before the first starts."""

from __future__ import annotations

import copy
import re
import time
from collections.abc import Sequence
from pathlib import Path

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from mft.config.compose import resolved
from mft.config.given_keys import given_keys
from mft.config.hydra_compose import recorded_places, without_hydra
from mft.config.inert import without_effect
from mft.config.messages import explained
from mft.config.overrides import check_overrides, key_of
from mft.console.screen import say
from mft.errors import UserError
from mft.launch.job import Job, checked
from mft.sweep.folder import SweepContext, is_sweep

VALUE = re.compile(r"[A-Za-z_]\w*(\.[\w-]+)+=")
"""An override of a value, not of a group: `optimizer.lr=…`."""

NEWS_SECONDS = 5.0
"""How often the progress of checking is printed."""


class Composer:
    """Composes and checks the jobs of one sweep. Hydra composes once what differs by plain values alone."""

    def __init__(self, context: SweepContext, starts: bool = True):
        """starts: whether this process is about to run the jobs."""
        cfg = context.cfg
        self.cfg, self.loader, self.starts = cfg, context.loader, starts and not context.dry_run
        # keys of the overrides that are not swept: keys, since Hydra writes true as True
        self.fixed = {key_of(o) for o in cfg.hydra.overrides.task if not is_sweep(o)}
        self.bases: dict[tuple[str, ...], DictConfig] = {}
        folders = [Path(str(folder).removeprefix("file://")) for folder in cfg.hydra.searchpath]
        self.search = recorded_places(map(str, cfg.hydra.searchpath))
        self.given_keys = given_keys(cfg.hydra.overrides.task, folders)
        self.notes: list[str] | None = None
        """Settings without effect in every job so far."""

    def job(self, overrides: Sequence[str]) -> Job:
        """Returns the checked job of these overrides; UserError that names it if it cannot run."""
        label = " ".join(o for o in overrides if key_of(o) not in self.fixed) or "(all as given)"
        search = [o for o in self.cfg.hydra.overrides.hydra if key_of(o) == "hydra.searchpath"]
        try:
            with explained(search, overrides):
                check_overrides(overrides)
                cfg = resolved(self._composed(overrides))
            if cfg.launch.nnodes > 1:
                raise UserError("a sweep runs on one machine; launch.nnodes is for one run on several.")
            own = [o for o in overrides if key_of(o) != "sweep"]
            job = checked(cfg, own, label, self.starts, self.search)
        except UserError as error:
            raise UserError(f"job {label}: {error}") from error
        notes = without_effect(job.cfg, job.world, self.given_keys, sweep=True)
        self.notes = notes if self.notes is None else [note for note in self.notes if note in notes]
        return job

    def swept(self, job: Job) -> dict[str, str]:
        """Returns {key: value} of the overrides that are not the same in all jobs."""
        pairs = [(key_of(override), override.partition("=")[2]) for override in job.overrides]
        return {key: value for key, value in pairs if key not in self.fixed}

    def _composed(self, overrides: Sequence[str]) -> DictConfig:
        """Returns what Hydra composes of these overrides (150 ms), or sets swept values in a copy of that."""
        from hydra.core.override_parser.overrides_parser import OverridesParser

        swept = [o for o in overrides if VALUE.match(o) and key_of(o) not in self.fixed]
        rest = tuple(o for o in overrides if o not in swept)
        if rest in self.bases:
            cfg = copy.deepcopy(self.bases[rest])
            try:
                for override in OverridesParser.create().parse_overrides(swept):
                    OmegaConf.update(cfg, override.key_or_group, override.value(), merge=True)
                return cfg
            except OmegaConfBaseException:
                pass  # Hydra's own refusal has the names that `explained` looks for
        cfg = without_hydra(self.loader.load_sweep_config(self.cfg, list(overrides)))
        self.bases.setdefault(rest, copy.deepcopy(cfg))
        return cfg


def check_all(composer: Composer, job_overrides: Sequence[Sequence[str]]) -> list[Job]:
    """Composes and checks every job; UserError names the first one that cannot run, before any starts."""
    jobs, reported = [], time.monotonic()
    for number, overrides in enumerate(job_overrides, start=1):
        jobs.append(composer.job(overrides))
        if time.monotonic() - reported > NEWS_SECONDS:
            reported = time.monotonic()
            say(f"checking jobs: {number} of {len(job_overrides)}")
    return jobs
