"""Hydra's sweepers for `mft train -m`: a grid and a search; see `mft.sweep.jobs` and
`mft.sweep.optuna_search`.

Private of Hydra 1.3: `core_plugins.basic_sweeper`; `tests/config/test_hydra_compose.py` fails where it is
gone.
"""

from __future__ import annotations

from typing import Any

from hydra._internal.core_plugins import basic_sweeper
from hydra.core.config_store import ConfigStore
from hydra.core.override_parser.types import Override
from hydra.plugins.sweeper import Sweeper
from hydra.types import HydraContext
from omegaconf import DictConfig


class Grid(basic_sweeper.BasicSweeper):
    """Every combination. Jobs are checked by `mft.sweep.jobs`, also where the launcher of another package
    runs them."""

    def setup(self, *, hydra_context: HydraContext, task_function: Any, config: DictConfig) -> None:
        from mft.sweep.external_launcher import ExternalLauncher
        from mft.sweep.folder import SweepContext

        super().setup(hydra_context=hydra_context, task_function=task_function, config=config)
        if config.hydra.runtime.choices["hydra/launcher"] != "mft":
            context = SweepContext(config, hydra_context.config_loader, task_function.dry_run)
            self.launcher = ExternalLauncher(self.launcher, context)

    @staticmethod
    def split_arguments(overrides: list[Override], max_batch_size: int | None) -> list[list[list[str]]]:
        """Returns batches of jobs, as Hydra does; UserError for an axis without values to combine."""
        from mft.errors import UserError

        for axis in filter(Override.is_sweep_override, overrides):
            if not axis.is_discrete_sweep():
                mend = "name them, or search with hydra/sweeper=optuna"
                raise UserError(f"{axis.input_line}: a grid combines single values; {mend}.")
            if not list(axis.sweep_string_iterator()):
                raise UserError(f"{axis.input_line}: there is no value of this kind, so there is no job.")
        return basic_sweeper.BasicSweeper.split_arguments(overrides, max_batch_size)

    def validate_batch_is_legal(self, batch: Any) -> None:
        """Does nothing: composing every job twice would double the time, and `mft.sweep.jobs` explains
        more."""


class Optuna(Sweeper):
    """Values that Optuna proposes from what earlier jobs have reached."""

    def __init__(self, **settings: Any) -> None:
        self.settings = settings

    def setup(self, *, hydra_context: HydraContext, task_function: Any, config: DictConfig) -> None:
        from mft.sweep.folder import SweepContext

        self.context = SweepContext(config, hydra_context.config_loader, task_function.dry_run)

    def sweep(self, arguments: list[str]) -> dict[str, Any]:
        from mft.sweep.optuna_search import run

        return run(self.context, arguments, self.settings)


# a plain dict: Hydra executes this module without registering it, and dataclasses look their module up
OPTUNA = {
    "_target_": "hydra_plugins.mft_sweepers.Optuna",
    "sampler": "tpe",  # tpe or random
    "n_trials": 20,  # jobs, those of earlier commands in the same folder included
    "startup_trials": 10,  # jobs drawn at random before TPE has something to go by
    "seed": 0,  # of the sampler
    "params": None,  # key -> interval(…), range(…), choice(…); what the command line sweeps is added
}
ConfigStore.instance().store(group="hydra/sweeper", name="optuna", node=OPTUNA, provider="mft")
