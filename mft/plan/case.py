"""A config on a device: composed and checked as `mft train` does it, but for a machine that may be another
one, with no more of the model than its config.json."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from omegaconf import DictConfig, OmegaConf

from mft.batch import BatchSizes
from mft.config.build import Components, build_components
from mft.config.compose import compose_resolved
from mft.config.overrides import with_output_dir
from mft.config.schema import Launch, LaunchMode, batch_sizes
from mft.config.validate import check
from mft.errors import UserError
from mft.estimate.skeletons import Skeleton, Skeletons
from mft.files.json_file import read_json
from mft.hardware import machine_memory
from mft.launch.placement import ranks
from mft.plan.gpus import Device


@dataclass(frozen=True)
class Case:
    """A checked config, resolved for a device."""

    cfg: DictConfig
    """Of a model that is a folder, in a precision that is not auto."""
    parts: Components
    device: Device
    world: int
    """Ranks on all machines."""
    machines: int
    """Among which they are divided evenly."""
    host: float | None = None
    """Bytes of a machine's memory, None: not known."""
    skeletons: Skeletons = field(default_factory=Skeletons)
    """Those of all cases that this one belongs to."""

    @property
    def skeleton(self) -> Skeleton:
        """Its model without weights; UserError for a model that only its own code can build."""
        return self.skeletons.of(self.parts, self.cfg.train.precision.value)

    @property
    def sizes(self) -> BatchSizes:
        """Micro-batches of a step."""
        return batch_sizes(self.cfg.train, self.world)

    @property
    def tokens(self) -> int:
        """Tokens of a full micro-batch of one rank."""
        return self.sizes.per_device * int(self.cfg.data.seq_length)

    @property
    def memory(self) -> float:
        """Bytes of the device that are a rank's."""
        memory = self.device.memory
        return memory / self.together if self.device.kind == "cpu" else memory

    @property
    def together(self) -> int:
        """Ranks of a machine."""
        return max(1, self.world // self.machines)


def composed(overrides: Sequence[str], config_dirs: Sequence[Path] = ()) -> DictConfig:
    """Returns the config of overrides, with what is known here of its model and its adapter written into it.

    Raises UserError as `mft train` does for a command line, and for a model whose config.json is not here.
    """
    cfg = compose_resolved(with_output_dir(overrides), config_dirs)
    _locate_model(cfg)
    _describe_adapter(cfg)
    return cfg


def case(
    cfg: DictConfig, device: Device, host: float | None = None, skeletons: Skeletons | None = None
) -> Case:
    """Returns a composed config on a device; raises UserError for what is wrong with it there.

    host: bytes of the memory of a machine with that device, None = not known, or this machine's; skeletons:
    those of the other cases of a plan.
    """
    cfg = copy.deepcopy(cfg)
    if host is not None and device.kind == "cpu":
        device = replace(device, memory=host)
    cfg.train.precision = device.precision(cfg.train.precision)
    launch = OmegaConf.to_object(cfg.launch)
    assert isinstance(launch, Launch)
    launch.check()
    world = _ranks(launch, device) * launch.nnodes
    here = host if host is not None else float(machine_memory()) if device.visible else None
    parts = check(cfg, world, elsewhere=True)
    return Case(cfg, parts, device, world, launch.nnodes, here, skeletons or Skeletons())


def case_on(
    cfg: DictConfig, parts: Components, device: Device, world: int, skeletons: Skeletons | None = None
) -> Case:
    """Returns a run's config, which is checked and resolved for its machine, on a device of that."""
    if getattr(parts.peft, "path", None):
        cfg = copy.deepcopy(cfg)
        _describe_adapter(cfg)
        parts = build_components(cfg)
    nodes = min(int(cfg.launch.nnodes), world)
    return Case(cfg, parts, device, world, nodes, skeletons=skeletons or Skeletons())


def changed(of: Case, cfg: DictConfig) -> Case:
    """Returns a case with another config; raises UserError where that is wrong."""
    return replace(of, cfg=cfg, parts=check(cfg, of.world, elsewhere=True))


def _ranks(launch: Launch, device: Device) -> int:
    """Returns the ranks of one machine with this device."""
    if launch.mode is LaunchMode.inline:
        return 1
    if device.visible:
        return ranks(launch.nproc)
    if device.count is not None:
        return device.count
    nproc = str(launch.nproc)
    if nproc.isdigit() and int(nproc):
        return int(nproc)
    return 1 if nproc == "auto" else ranks(launch.nproc)  # which says what is wrong with it


def _locate_model(cfg: DictConfig) -> None:
    """Puts the folder of the hub's cache in the place of a hub name; UserError where it is not there."""
    path = OmegaConf.select(cfg, "model.path", throw_on_missing=False)
    if not isinstance(path, str) or not path or "://" in path or Path(path).expanduser().exists():
        return
    if path.startswith(("/", ".", "~")) or path.count("/") > 1:  # a folder that is missing
        return
    from huggingface_hub import try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError

    try:
        found = try_to_load_from_cache(path, "config.json", revision=cfg.model.get("revision"))
    except HFValidationError:
        return  # no hub name either, which the model's own check says
    if not isinstance(found, str):
        raise UserError(
            f"model.path={path} is neither a folder nor in the hub's cache, and a plan fetches nothing. Give "
            f"a folder with its config.json, or fetch that alone: hf download {path} config.json"
        )
    cfg.model.path, cfg.model.revision = str(Path(found).parent), None


def _describe_adapter(cfg: DictConfig) -> None:
    """Writes rank and targets of the adapter at peft.path into the config, in the place of the path."""
    path = OmegaConf.select(cfg, "peft.path", throw_on_missing=False)
    if not path:
        return
    own = read_json(Path(path).expanduser() / "adapter_config.json")
    rank, targets = own.number("r"), own.texts("target_modules") or own.text("target_modules")
    if rank is None or not targets:
        raise UserError(f"peft.path={path}: its adapter_config.json names neither r nor target_modules.")
    # targets are names, or paths of a model that may be wrapped: their last parts are names
    names = sorted({name.rpartition(".")[2] for name in targets}) if isinstance(targets, list) else targets
    cfg.peft.path, cfg.peft.rank, cfg.peft.targets = None, int(rank), names
