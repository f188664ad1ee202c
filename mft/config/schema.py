"""The settings of a run: their schema, where conf/ is, and how a resolved config is frozen and read back.

Settings (`name`, `train`, `launch`, `data`) are read by the code and typed here; components (`model`, `peft`,
...) are built by `mft.config.build`, their schema is their class.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import StrEnum
from pathlib import Path
from typing import Any

from omegaconf import MISSING, DictConfig, ListConfig, OmegaConf

from mft.batch import BatchSizes
from mft.config import interpolations, yaml_file
from mft.data.settings import DataSettings
from mft.errors import UserError, check_ranges, ranged
from mft.files.atomic import write_text
from mft.files.cache_folder import default_cache_dir
from mft.hardware import computes_in_bf16, visible_gpus
from mft.training.settings import AUTO, Precision, TrainSettings

LONGEST = 10_000_000
"""Seconds that a setting may ask to wait, four months; timers of the system end not far beyond."""


EARLIER_KEYS = ("allow_targets", "fail_fast", "prune", "prune_after")
"""Keys of `train` that earlier versions froze and no rank reads."""


class LaunchMode(StrEnum):
    """processes: every run has its own worker processes; inline: in this process, for a debugger."""

    processes = "processes"
    inline = "inline"


@dataclass
class Launch:
    """Who starts ranks and jobs, and where; conf/launch explains every field."""

    mode: LaunchMode = LaunchMode.processes
    nproc: Any = "auto"
    """Ranks on this machine; auto: all visible GPUs, 1 without (of several jobs at once: each one's part)."""
    shutdown_seconds: int = ranged(600, min=0, max=LONGEST)
    """Seconds that ranks may take to save after a signal; raise it where a checkpoint takes longer."""
    jobs: int = ranged(1, min=1)
    """Jobs of a sweep at once on this machine."""
    fail_fast: bool = False
    """A sweep ends at its first failed job instead of running the others."""
    prune: bool = False
    """A sweep ends a job whose best objective is worse than the median of the others at equal steps."""
    prune_after: int = ranged(2, min=1)
    """Validations a job gets before it may be pruned (three other jobs must have come as far)."""
    nnodes: int = ranged(1, min=1)
    """Machines of the run; the same command is started on each."""
    node_rank: int | None = None
    """This machine's number from 0, with `main_address`; c10d numbers the machines itself."""
    main_address: str | None = None
    """Address or name of machine 0, which listens there; or `rdzv_endpoint`."""
    main_port: int = ranged(29500, min=1, max=65535)
    """Port at `main_address`."""
    rdzv_endpoint: str | None = None
    """host:port of one of the machines, for torch's c10d rendezvous."""
    local_addr: str | None = None
    """This machine's address for the others; null: the one from which it reaches the meeting point."""
    join_seconds: int = ranged(600, min=1, max=LONGEST)
    """Seconds that the machines wait for one another at the start."""
    lost_seconds: int = ranged(60, min=1, max=LONGEST)
    """Seconds without a heartbeat after which a machine counts as gone."""

    def check(self) -> None:
        """Raises UserError for values that types alone cannot refuse."""
        check_ranges(self, "launch")
        if self.node_rank is not None and not 0 <= self.node_rank < self.nnodes:
            raise UserError(
                f"launch.node_rank={self.node_rank}: with launch.nnodes={self.nnodes} machines are "
                f"numbered 0 to {self.nnodes - 1}."
            )
        if self.rdzv_endpoint is not None:
            host, _, port = self.rdzv_endpoint.rpartition(":")
            if not host or not port.isdigit() or not 1 <= int(port) <= 65535:
                raise UserError(
                    f"launch.rdzv_endpoint={self.rdzv_endpoint}: write host:port, such as node0:29400."
                )
        if self.nnodes == 1:
            return
        if self.mode is LaunchMode.inline:
            raise UserError(f"launch.nnodes={self.nnodes} needs launch=processes; launch=inline is one rank.")
        if (self.main_address is None) == (self.rdzv_endpoint is None):
            raise UserError(
                f"launch.nnodes={self.nnodes}: say where the machines meet, with launch.main_address (and "
                "launch.node_rank on each), or with launch.rdzv_endpoint=host:port; one of the two."
            )
        if self.main_address is not None and self.node_rank is None:
            raise UserError(
                f"launch.node_rank is missing: number the {self.nnodes} machines from 0; number 0 is the "
                f"one with launch.main_address={self.main_address}."
            )
        if self.rdzv_endpoint is not None and self.node_rank is not None:
            raise UserError(
                f"launch.node_rank={self.node_rank}: with launch.rdzv_endpoint machines are numbered as "
                "they come; remove it, or use launch.main_address instead."
            )


@dataclass
class Config:
    """The complete config. `mft.config.validate.check` checks component groups against their classes."""

    name: str = "mft"
    """Groups runs: outputs/<name>/, multirun/<name>/, MLflow's experiment."""
    sweep: str | None = None
    """Id and folder of a sweep; null: a hash of everything that is not swept."""
    choices: dict[str, str] = field(default_factory=dict)
    """Config group → option chosen; filled in while composing."""
    output_dir: str = MISSING
    """The run folder."""
    cache_dir: str = MISSING
    """Token caches and converted models; may be shared by all runs of a machine."""
    task: dict[str, Any] = field(default_factory=dict)
    """Key → component, typed by `mft.data.task.Task`; the groups below likewise, by their contracts."""
    data: DataSettings = field(default_factory=DataSettings)
    model: Any = MISSING
    peft: Any = MISSING
    dist: Any = MISSING
    loss: Any = MISSING
    optimizer: Any = MISSING
    scheduler: Any = MISSING
    tracking: dict[str, Any] = field(default_factory=dict)
    train: TrainSettings = field(default_factory=TrainSettings)
    launch: Launch = field(default_factory=Launch)


def config_dir() -> Path:
    """Returns the folder of the yaml tree: `mft/conf` in an installed wheel, else the repository's `conf`."""
    package = Path(__file__).parents[1]
    in_wheel = package / "conf"
    return in_wheel if in_wheel.is_dir() else package.parent / "conf"


def register() -> None:
    """Makes the schema and the `mft_cache` resolver known to Hydra. Safe to call twice."""
    from hydra.core.config_store import ConfigStore

    OmegaConf.register_new_resolver("mft_cache", default_cache_dir, replace=True)
    interpolations.register()
    yaml_file.register()
    if "schema.yaml" in ConfigStore.instance().repo:
        return  # made once: it takes a tenth of a composition
    schema = OmegaConf.structured(Config)
    # A task's yaml may leave out fields that have defaults; without the flag Hydra would not let them be set
    # either. Wrong names are refused by the task's class.
    schema.task._set_flag("struct", False)
    ConfigStore.instance().store(name="schema", node=schema, provider="mft")


def plain(cfg: DictConfig) -> dict[str, Any]:
    """Returns a config as nested dicts of plain values."""
    container = OmegaConf.to_container(cfg, enum_to_str=True)
    assert isinstance(container, dict)
    return {str(key): value for key, value in container.items()}


def freeze(cfg: DictConfig, path: Path) -> None:
    """Writes the config atomically; every rank reads this file and nothing else, but for `${oc.env:NAME}` in
    it."""
    write_text(path, OmegaConf.to_yaml(cfg))


def load(run_dir: Path) -> DictConfig:
    """Reads back a frozen config, typed by the schema."""
    path = run_dir / "config.yaml"
    if not path.is_file():
        raise UserError(f"{run_dir} is not a run folder: it has no config.yaml.")
    return typed(read(path))


def read(path: Path) -> Any:
    """Returns a frozen config without its types; keys that earlier versions had are left out."""
    interpolations.register()
    yaml_file.check(path)
    cfg = OmegaConf.load(path)
    if isinstance(cfg, DictConfig) and isinstance(cfg.get("train"), DictConfig):
        for key in EARLIER_KEYS:
            cfg.train.pop(key, None)
    return cfg


def typed(cfg: DictConfig | ListConfig | dict[str, Any]) -> DictConfig:
    """Returns a plain config under the schema, so that choices are enums again."""
    merged = OmegaConf.merge(OmegaConf.structured(Config), cfg)
    assert isinstance(merged, DictConfig)
    return merged


def resolve_precision(precision: Precision | str) -> Precision:
    """Returns train.precision with auto resolved for this machine: bf16 where it computes in that, else fp16
    on a GPU and fp32 on a CPU."""
    if precision != Precision.auto:
        return Precision(precision)
    if computes_in_bf16():
        return Precision.bf16
    return Precision.fp16 if visible_gpus() else Precision.fp32


def settings_of(cfg: DictConfig) -> tuple[TrainSettings, DataSettings]:
    """Returns `train` and `data` of a typed config as objects."""
    settings, data_settings = OmegaConf.to_object(cfg.train), OmegaConf.to_object(cfg.data)
    assert isinstance(settings, TrainSettings) and isinstance(data_settings, DataSettings)
    return settings, data_settings


def batch_sizes(train: TrainSettings | DictConfig, world: int) -> BatchSizes:
    """Derives accumulation from the global batch or the other way round; of micro-batches whose size is still
    to be found one row each.

    Raises UserError when both are given, the global batch does not divide, or auto has none to divide.
    """
    per_device, total = train.per_device_batch_size, train.global_batch_size
    accumulation = train.gradient_accumulation_steps
    if per_device == AUTO:
        return _of_auto(total, accumulation, world)
    if total is None:
        return BatchSizes(int(per_device), accumulation or 1, world)
    if accumulation is not None:
        raise UserError(
            f"train.global_batch_size={total} and train.gradient_accumulation_steps={accumulation} exclude "
            "each other; set one of them, the other is derived."
        )
    per_device = int(per_device)
    ranks = f"train.per_device_batch_size={per_device} x {world} ranks"
    return BatchSizes(per_device, _times(per_device * world, total, ranks), world)


def _of_auto(total: int | None, accumulation: int | None, world: int) -> BatchSizes:
    if accumulation is not None:
        raise UserError(
            f"train.gradient_accumulation_steps={accumulation} and train.per_device_batch_size=auto exclude each "
            "other: the accumulation follows from the size that is found. Give train.global_batch_size instead."
        )
    if total is None:
        raise UserError(
            "train.per_device_batch_size=auto needs train.global_batch_size, the rows of a step over all ranks, "
            f"since a step must be the same on every device. Allowed: a multiple of the ranks, here {world}."
        )
    return BatchSizes(1, _times(world, total, f"{world} ranks"), world, found=False)


def _times(unit: int, total: int, words: str) -> int:
    """Returns how many units make the global batch; UserError where none do. words: what a unit is."""
    if total % unit:
        below, above = total // unit * unit, (total // unit + 1) * unit
        raise UserError(
            f"train.global_batch_size={total} must be a multiple of {words}. Nearest values: "
            f"{f'{below} or ' if below else ''}{above}."
        )
    return total // unit
