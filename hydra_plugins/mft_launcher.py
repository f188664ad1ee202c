"""Hydra's launcher for `mft train -m`. Hydra finds launchers only in `hydra_plugins`; the work is in
`mft.sweep`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from hydra.core.config_store import ConfigStore
from hydra.plugins.launcher import Launcher


class MftLauncher(Launcher):
    """Hands the jobs of a sweep to `mft.sweep.jobs.run_grid`; `launch` has the settings."""

    def setup(self, *, hydra_context: Any, task_function: Any, config: Any) -> None:
        self.hydra_context, self.config, self.dry_run = hydra_context, config, task_function.dry_run

    def launch(self, job_overrides: Sequence[Sequence[str]], initial_job_idx: int) -> Sequence[Any]:
        from mft.sweep.jobs import run_grid

        return run_grid(self.config, self.hydra_context.config_loader, job_overrides, self.dry_run)


# a plain dict: Hydra executes this module without registering it, and dataclasses look their module up
NODE = {"_target_": "hydra_plugins.mft_launcher.MftLauncher"}
ConfigStore.instance().store(group="hydra/launcher", name="mft", node=NODE, provider="mft")
