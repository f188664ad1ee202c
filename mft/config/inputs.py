"""Every input of a run, and where it enters the run's identity: as a value, as a fingerprint, or not at all.

Values equal to the default of their class stay out, so that a new option whose default changes nothing
changes no identity. Classes of ours enter by their public name, so that moving one changes nothing; others by
their full target.
"""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Iterable, Mapping, Sequence
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Any

from omegaconf import DictConfig, OmegaConf

from mft.config.components import component_class
from mft.config.identity import Identity
from mft.config.schema import Launch, batch_sizes
from mft.data.cache.fingerprint import file_digests
from mft.data.settings import DataSettings
from mft.data.task import Task
from mft.data.template_choice import is_file
from mft.training.settings import TrainSettings

if TYPE_CHECKING:
    from mft.model.causal_lm import CausalLM
    from mft.model.peft.full import Full

_WHY_LEFT_OUT = {
    "groups runs": "name sweep",
    "the components that were chosen enter": "choices",
    "a place": "output_dir cache_dir model.cache_dir",
    "who starts ranks; their number enters as the global batch, and a pruned run is unfinished": "launch",
    "records": "tracking train.log_every train.sample_losses",
    "which folder is continued": "train.resume",
    "what stays of checkpoints": "train.keep train.keep_task_best train.save_state",
    "a run that ends without a skipped step is the same for all values": "train.skip_nonfinite_steps",
    "the same micro-batches, made sooner": "train.prefetch",
    "saving draws no random number": "train.save_every",
    "answered without random numbers": "train.prompts train.prompts_max_new_tokens",
    "a speed is divided by it": "train.peak_tflops",
    "it watches steps": "train.profile",
    "it chooses between kernels that agree to rounding, as machines do": "train.deterministic "
    "model.fused peft.fused",
    "enters as the global batch": "train.per_device_batch_size train.gradient_accumulation_steps "
    "train.global_batch_size",
    "a validation counts tokens, however they are batched": "train.per_device_eval_batch_size",
    "a run either stops at a bad row or has none of it": "data.bad_rows",
    "how long ranks wait for each other": "dist.timeout_minutes",
    "the same bits of packed weights": "peft.storage_dtype",
    "words": "task.*.hint model.hint",
}

CANNOT_CHANGE_THE_RESULT = {path: why for why, paths in _WHY_LEFT_OUT.items() for path in paths.split()}
"""Config path (* = any name) → why it is left out of a run's identity."""

FINGERPRINTED: dict[str, str] = {
    "data.paths": "names and order as the tasks, contents as task.<name>",
    "task.*.name": "as the tasks",
    "task.*.paths": "as task.<name>",
    "task.*.valid": "as task.<name>",
    "model.path": "as base model, tokenizer and code",
    "model.revision": "as base model: of a hub name it is part of the fingerprint, a folder has none",
    "peft.path": "as adapter",
}
"""Config path → the fingerprint, or part of the identity, that stands for it: contents count, not where they
lie."""

TEMPLATE_FILE = "(a file)"
"""Stands for the name of a template file, whose content is a fingerprint."""

SETTINGS: dict[str, type] = {"train": TrainSettings, "data": DataSettings, "launch": Launch}


def under(path: str, prefixes: Iterable[str]) -> bool:
    """Whether a dotted path is one of `prefixes` or lies below one; `*` in a prefix is any one name."""
    parts = path.split(".")
    for prefix in prefixes:
        names = prefix.split(".")
        if len(names) <= len(parts) and all(n in ("*", p) for n, p in zip(names, parts, strict=False)):
            return True
    return False


def identity(cfg: DictConfig, world: int, tasks: Sequence[str], fingerprints: Mapping[str, str]) -> Identity:
    """Returns which experiment a resolved, checked config is.

    world: number of ranks; tasks: names in order; fingerprints: see `fingerprints`.
    """
    choices, values = config_parts(cfg)
    choices["global batch"] = str(batch_sizes(cfg.train, world).total)
    return Identity.of(tasks, choices, values, fingerprints)


def fingerprints(cfg: DictConfig, tasks: Sequence[Task], family: CausalLM, peft: Full) -> dict[str, str]:
    """Returns the hashes of all that a run of this config reads besides the config: name → hash.

    tasks, family, peft: the built components. Raises UserError for files that cannot be read.
    """
    return {f"task.{task.name}": task.fingerprint(cfg.cache_dir) for task in tasks} | files(cfg, family, peft)


def files(cfg: DictConfig, family: CausalLM, peft: Full) -> dict[str, str]:
    """Returns the part of `fingerprints` that is not about the rows of tasks; quick enough to be made
    again."""
    hashes = dict(family.fingerprints())
    if is_file(cfg.data.template):
        hashes["template"] = file_digests([Path(cfg.data.template).expanduser()], Path(cfg.cache_dir))[0]
    if adapter := peft.files():
        digests = file_digests(adapter, Path(cfg.cache_dir))
        named = [[file.name, digest] for file, digest in zip(adapter, digests, strict=True)]
        hashes["adapter"] = hashlib.sha1(repr(named).encode()).hexdigest()
    return hashes


def config_parts(cfg: DictConfig) -> tuple[dict[str, str], dict[str, object]]:
    """Returns ({component path: public name}, {dotted key: value}) of all that enters an identity as a
    value."""
    plain: Any = OmegaConf.to_container(cfg, resolve=True, enum_to_str=True)
    choices: dict[str, str] = {}
    values: dict[str, object] = {}

    def enter(path: str, value: Any, default: object) -> None:
        if under(path, CANNOT_CHANGE_THE_RESULT) or under(path, FINGERPRINTED):
            return
        if isinstance(value, dict) and "_target_" in value:
            # By public name, so that moving a class changes no identity.
            cls = component_class(OmegaConf.select(cfg, path), path)
            if default != Named(name := public_name(cls, value["_target_"])):
                choices[path] = name
            default_values = defaults(cls) if name != value["_target_"] else {}
        elif path in SETTINGS:
            default_values = defaults(SETTINGS[path])
        elif path in ("task", "tracking"):  # of what is chosen, not of a class
            default_values = {}
        else:
            if (value := canonical(value)) != default:
                values[path] = value
            return
        for key, item in value.items():
            if key != "_target_":
                enter(f"{path}.{key}", item, default_values.get(key, dataclasses.MISSING))

    for key, value in plain.items():
        enter(key, value, dataclasses.MISSING)
    if is_file(plain["data"]["template"]):
        values["data.template"] = TEMPLATE_FILE
    return choices, values


@dataclasses.dataclass(frozen=True)
class Named:
    """A default that is a component, by its public name."""

    name: str


def public_name(cls: type, target: str) -> str:
    """Returns the public name of a class of ours; the full target of any other, also of a subclass of
    ours."""
    if cls.__module__.partition(".")[0] == "mft" and vars(cls).get("public_name"):
        return str(vars(cls)["public_name"])
    return target


def defaults(cls: type) -> dict[str, object]:
    """Returns the defaults of a dataclass's fields that have one, as `canonical` values."""
    values: dict[str, object] = {}
    for field in dataclasses.fields(cls) if dataclasses.is_dataclass(cls) else ():
        if field.default is not dataclasses.MISSING:
            values[field.name] = canonical(field.default)
        elif field.default_factory is not dataclasses.MISSING:
            values[field.name] = canonical(field.default_factory())
    return values


def canonical(value: object) -> object:
    """Returns a value as JSON takes it, the same for 1 and 1.0 and for a choice and its name."""
    if isinstance(value, Enum):
        return value.name
    if isinstance(value, float) and value.is_integer():  # 1 on a command line, 1.0 in a yaml
        return int(value)
    if isinstance(value, Mapping):
        return {str(key): canonical(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [canonical(item) for item in value]
    if name := getattr(type(value), "public_name", ""):
        return Named(name)
    return value
