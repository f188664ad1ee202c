"""Hydra's launcher for `mft train -m`. Hydra finds launchers only in `hydra_plugins`; the work is in
`mft.sweep`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from hydra.core.config_store import ConfigStore
from hydra.core.utils import JobReturn
from hydra.plugins.launcher import Launcher
from hydra.types import HydraContext
from omegaconf import DictConfig


class MftLauncher(Launcher):
    """Passes the jobs of a sweep to `mft.sweep.jobs.run_grid`; `launch` has the settings."""

    def setup(self, *, hydra_context: HydraContext, task_function: Any, config: DictConfig) -> None:
        from mft.sweep.folder import SweepContext

        self.context = SweepContext(config, hydra_context.config_loader, task_function.dry_run)

    def launch(self, job_overrides: Sequence[Sequence[str]], initial_job_idx: int) -> Sequence[JobReturn]:
        from mft.sweep.jobs import run_grid

        return run_grid(self.context, job_overrides)


# a plain dict: Hydra executes this module without registering it, and dataclasses look their module up
NODE = {"_target_": "hydra_plugins.mft_launcher.MftLauncher"}
ConfigStore.instance().store(group="hydra/launcher", name="mft", node=NODE, provider="mft")
