"""The walk through everything that the doctor looks at, and the verdict on the composed config."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from omegaconf import DictConfig, OmegaConf

from mft.config import build
from mft.config.compose import compose_resolved
from mft.console.credentials import hidden
from mft.doctor import abilities, children, environment, machine, network, places, versions
from mft.doctor.finding import Finding, Part, State
from mft.doctor.needs import needs_of
from mft.errors import UserError
from mft.launch import job
from mft.tracking.mlflow import Mlflow
from mft.tracking.store import database_file

config = Part("config")


def examine(
    overrides: Sequence[str],
    variables: Mapping[str, str],
    config_dirs: Sequence[Path] = (),
    patience: float = children.LIMIT,
) -> Iterator[Finding]:
    """Yields everything that was found, the quick things first, and whether the config can run last.

    overrides, config_dirs: what composes the config that is judged; variables: of the environment, as it was
    before libraries added theirs; patience: seconds of each attempt. Raises UserError for a config that
    cannot be composed.
    """
    found: list[Finding] = []
    for finding in _everything(overrides, variables, config_dirs, patience):
        found.append(finding)
        yield finding
    problems = [finding.name for finding in found if finding.state is State.problem]
    if problems:
        what = ", ".join(dict.fromkeys(problems))
        yield config.problem("your config", f"cannot run here as it is: {what}", "see the problems above")
    else:
        yield config.ok("your config", "nothing that it needs is missing here")


def _everything(
    overrides: Sequence[str], variables: Mapping[str, str], config_dirs: Sequence[Path], patience: float
) -> Iterator[Finding]:
    cfg = compose_resolved(overrides, config_dirs)
    needs = needs_of(cfg)
    yield from versions.findings(needs)
    yield from machine.findings()
    yield from places.findings(cfg, needs)
    yield from environment.findings(variables)
    yield from network.findings(cfg, needs)
    uri = ""
    for finding in _trackers(cfg):
        if isinstance(finding, str):
            uri = finding
        else:
            yield finding
    yield from _checked(cfg, overrides)
    yield from abilities.findings(needs, uri, patience)


def _trackers(cfg: DictConfig) -> Iterator[Finding | str]:
    """Yields what is known of the trackers without asking, and the address of a store that can be asked."""
    part = Part("network")
    for name in cfg.tracking:
        try:
            tracker = build.component(cfg, f"tracking.{name}")
        except UserError as error:
            yield part.problem("tracker", str(error), "tracking=none, or an address that is one")
            continue
        if not isinstance(tracker, Mlflow):
            yield part.ok("tracker", f"{type(tracker).__name__}, which needs no store")
            continue
        uri = tracker.address()
        database = database_file(uri)
        if database is None or database.exists():
            yield uri
            continue
        place = places.of_folder("tracker", database.parent, "tracking.mlflow.store=…")
        made = part.ok("tracker", f"the first run makes {database}")
        yield made if place.state is State.ok else replace(place, part=part.name)


def _checked(cfg: DictConfig, overrides: Sequence[str]) -> Iterator[Finding]:
    """Yields what `mft train` says of the config, where it names a model and data."""
    missing = OmegaConf.is_missing(cfg.model, "path") or not (cfg.task or cfg.data.paths)
    if missing:
        return
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            job.checked(cfg, overrides, starts=False)
        except UserError as error:
            yield config.problem("checks", str(error), "see the sentence")
        else:
            yield config.ok("checks", "settings, model and data are what `mft train` expects")


def shown(finding: Finding) -> Finding:
    """Returns a finding as it may leave this process, without credentials."""
    return replace(finding, found=hidden(finding.found), cure=hidden(finding.cure))
