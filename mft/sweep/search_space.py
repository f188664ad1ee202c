"""What a search may propose: the distributions of a command line, and its settings."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from omegaconf import DictConfig

from mft.config.overrides import key_of
from mft.errors import UserError, nearest
from mft.launch.placement import detect_rank
from mft.sweep.folder import is_sweep

if TYPE_CHECKING:
    from optuna.distributions import BaseDistribution

SAMPLERS = ("tpe", "random")
DIGITS = 4
"""Significant digits of a proposed value: readable and repeatable, and far finer than the noise."""


def split(
    arguments: Sequence[str], params: Mapping[str, Any]
) -> tuple[list[str], dict[str, BaseDistribution]]:
    """Returns (overrides of every job, {key: distribution}); the command line takes precedence over
    `params`."""
    by_key = {key_of(o): o for o in arguments}
    swept = {name: f"{name}={text}" for name, text in _flat(params) if name not in by_key}
    swept |= {name: override for name, override in by_key.items() if is_sweep(override)}
    fixed = [override for name, override in by_key.items() if name not in swept]
    return fixed, {name: distribution(override) for name, override in swept.items()}


def _flat(params: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yields (dotted key, text) of hydra.sweeper.params, written with dots or nested."""
    for name, value in params.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value


def distribution(override: str) -> BaseDistribution:
    """Returns the distribution of `key=interval(1,2)`, `range(1,9)`, `choice(a,b)` or `a,b`, with tag(log,
    …)."""
    from hydra.core.override_parser.overrides_parser import OverridesParser
    from hydra.errors import HydraException
    from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution

    try:
        parsed = OverridesParser.create().parse_override(override)
        value: Any = parsed.value()
        log = "log" in getattr(value, "tags", ())
        if parsed.is_interval_sweep():
            if isinstance(value.start, int) and isinstance(value.end, int):
                return IntDistribution(value.start, value.end, log=log)
            return FloatDistribution(value.start, value.end, log=log)
        if parsed.is_range_sweep() and all(isinstance(v, int) for v in (value.start, value.stop, value.step)):
            values = list(value.range())  # its last one is inside, value.stop is not
            return IntDistribution(values[0], values[-1], step=abs(value.step))
        # as text, as Hydra's own sweeper passes values on
        if parsed.is_sweep_override():
            return CategoricalDistribution(tuple(parsed.sweep_string_iterator()))
    except (HydraException, ValueError, IndexError) as error:
        raise UserError(f"{override}: {str(error).splitlines()[0]}") from error
    raise UserError(
        f"{override}: a search needs several values, as tag(log, interval(1e-5, 1e-3)), interval(0, 1), "
        "int(interval(1, 9)), range(8, 65, 8) or choice(8, 16, 32)."
    )


def check_settings(cfg: DictConfig, settings: Mapping[str, Any], space: Mapping[str, Any]) -> None:
    """Raises UserError for what cannot be searched."""
    if not space:
        example = "optimizer.lr='tag(log, interval(1e-5, 1e-3))'"
        raise UserError(f"hydra/sweeper=optuna has nothing to search: add {example} or experiment=search.")
    if (sampler := settings["sampler"]) not in SAMPLERS:
        close = nearest(sampler, SAMPLERS)
        raise UserError(f"hydra.sweeper.sampler={sampler} must be one of {', '.join(SAMPLERS)}{close or '.'}")
    for name in ("n_trials", "startup_trials"):
        if not str(settings[name]).isdigit() or int(settings[name]) < 1:
            raise UserError(f"hydra.sweeper.{name}={settings[name]} must be at least 1.")
    if (launcher := cfg.hydra.runtime.choices["hydra/launcher"]) != "mft":
        side = "launch.jobs=2 runs two jobs side by side on this machine"
        raise UserError(f"hydra/sweeper=optuna needs hydra/launcher=mft, not {launcher}; {side}.")
    if detect_rank() is not None:
        placed = "run it without torchrun, accelerate launch or srun"
        raise UserError(f"hydra/sweeper=optuna starts the ranks of its jobs itself: {placed}.")


def boundary_trials(space: Mapping[str, Any]) -> list[list[str]]:
    """Returns overrides that touch both ends of every interval and every choice at least once."""
    extremes = {name: getattr(v, "choices", None) or (v.low, v.high) for name, v in space.items()}
    trials = []
    for number in range(max(map(len, extremes.values()))):
        # a key with fewer values repeats its last one
        trial = {name: values[min(number, len(values) - 1)] for name, values in extremes.items()}
        trials.append(to_overrides(trial))
    return trials


def to_overrides(params: Mapping[str, Any]) -> list[str]:
    """Returns the overrides of a trial's values."""
    return [f"{name}={f'{v:.{DIGITS}g}' if isinstance(v, float) else v}" for name, v in params.items()]
