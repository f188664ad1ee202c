"""`hydra/sweeper=optuna`: a sweep whose values Optuna proposes from what earlier jobs have reached.

The study lies in the sweep's folder (`search.journal`), so the same command resumes it: finished trials are
kept, interrupted ones resume from their checkpoint, failed ones are tried again. A job's folder is its
identity, as in grids.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

from mft.config.overrides import key_of
from mft.console.screen import say
from mft.errors import UserError, nearest
from mft.files.json_file import read_json, write_json
from mft.launch.job import objective
from mft.launch.placement import detect_rank
from mft.run_folder import RunStatus
from mft.sweep import display
from mft.sweep.composer import Composer, check_all
from mft.sweep.folder import DryRunDone, folder_of, is_sweep, remove_if_unused, require_this_version, taken
from mft.sweep.jobs import finish, require_success, run_side_by_side, sweep_job
from mft.sweep.pool import SweepJob

JOURNAL = "search.journal"
SAMPLERS = ("tpe", "random")
DIGITS = 4
"""Significant digits of a proposed value: what a person can read and repeat; the difference is far below the
noise."""

RETRIES = "retries"
"""A trial's attribute: the number of the failed trial that it repeats."""


def run(
    cfg: DictConfig, loader: Any, arguments: Sequence[str], settings: Mapping[str, Any], dry_run: bool
) -> Any:
    """Runs the trials that are left; returns (values, objective) of the best. UserError if any failed."""
    optuna = import_optuna()
    folder = folder_of(cfg)
    require_this_version(folder)
    try:
        fixed, space = split(arguments, settings.get("params") or {})
        check_settings(cfg, settings, space)
        composer = Composer(cfg, loader, starts=not dry_run)
        boundary = check_all(composer, [[*fixed, *trial] for trial in boundary_trials(space)])
    except UserError:
        remove_if_unused(folder)
        raise
    if dry_run:
        done = len(read_json(folder / "search.json").get("trials") or ())
        say(f"search {os.path.relpath(folder)}: {settings['n_trials']} trials, {done} of them done")
        for name, distribution in space.items():
            say(f"  {name:<24} {distribution}")
        say(f"{len(boundary)} jobs at the boundary of this space were checked; nothing was started")
        remove_if_unused(folder)
        raise DryRunDone
    with taken(cfg, folder):
        job_cfg = boundary[0].cfg
        search = Search(optuna, folder, space, fixed, composer, settings, job_cfg.launch.jobs)
        display.start(search.jobs, folder)
        signum = run_side_by_side(
            search.waiting(), search.jobs, folder, job_cfg, job_cfg.launch.jobs, search.total, search.on_end
        )
        finish(search.jobs, folder, signum)
        best = search.write_results()
    require_success(search.jobs)
    if search.refused:
        raise UserError("\n".join(search.refused))
    return best


class Search:
    """A study and its jobs."""

    def __init__(
        self,
        optuna: Any,
        folder: Path,
        space: Mapping[str, Any],
        fixed: Sequence[str],
        composer: Composer,
        settings: Mapping[str, Any],
        at_once: int,
    ):
        self.optuna, self.folder, self.space, self.fixed = optuna, folder, dict(space), list(fixed)
        self.composer, self.total = composer, int(settings["n_trials"])
        self.jobs: list[SweepJob] = []
        self.trial_numbers: dict[int, int] = {}  # by the number of the job
        self.refused: list[str] = []
        journal = optuna.storages.journal.JournalFileBackend(str(folder / JOURNAL))
        storage = optuna.storages.JournalStorage(journal)
        self.study = optuna.create_study(study_name="search", storage=storage, load_if_exists=True)
        # a fixed seed would draw again, after a restart, what it drew before
        seed = None if settings["seed"] is None else int(settings["seed"]) + len(self.study.trials)
        if settings["sampler"] == "random":
            self.study.sampler = optuna.samplers.RandomSampler(seed=seed)
        else:
            first = int(settings["startup_trials"])
            self.study.sampler = optuna.samplers.TPESampler(
                seed=seed, n_startup_trials=first, constant_liar=at_once > 1
            )
        self._require_same_space()
        for trial in self._newest():
            if trial.state.name == "COMPLETE":
                self._add(trial.number, trial.params)
            elif trial.state.name == "FAIL":
                root = trial.user_attrs.get(RETRIES, trial.number)
                self.study.enqueue_trial(trial.params, user_attrs={RETRIES: root})

    def waiting(self) -> Iterator[SweepJob]:
        """Yields jobs: those that were interrupted, those that failed before, then new ones until there are
        enough."""
        for trial in self._newest():
            if trial.state.name == "RUNNING":
                yield from self._next(trial.number, trial.params)
        while self._queued() or len(self._newest()) < self.total:
            trial = self.study.ask(self.space)
            yield from self._next(trial.number, trial.params)

    def on_end(self, job: SweepJob) -> None:
        """Tells the study how a job ended; a stopped one stays open and is resumed by the next command."""
        number = self.trial_numbers[job.number]
        if job.state in (RunStatus.finished, RunStatus.skipped):
            self.study.tell(number, objective(read_json(job.folder / "summary.json")))
        elif job.state in (RunStatus.pruned, RunStatus.same) and job.best is not None:
            self.study.tell(number, job.best)  # one that was ended early counts with the best it had
        elif job.state == RunStatus.failed:
            self.study.tell(number, state=self.optuna.trial.TrialState.FAIL)

    def write_results(self) -> dict[str, Any]:
        """Writes search.json, the values and the objective of every trial, and says which was the best."""
        rows = [
            {"trial": t.number, "state": t.state.name.lower(), "objective": t.value, "values": t.params}
            for t in self._newest()
        ]
        done = sorted((row for row in rows if row["objective"] is not None), key=lambda row: row["objective"])
        results = {"best": done[0] if done else None, "trials": rows}
        write_json(self.folder / "search.json", results)
        best = display.best_of(self.jobs)
        if best is not None:
            where = os.path.relpath(best.folder)
            say(f"best of {len(done)} trials: {best.best:.4f} with {best.checked.label}  ({where})")
            say("one seed a trial: repeat the best few with train.seed=1,2,3 before trusting their ranking")
        return results

    def _next(self, number: int, params: Mapping[str, Any]) -> Iterator[SweepJob]:
        """Yields the job of a trial if it has to run."""
        try:
            job = self._add(number, params)
        except UserError as error:  # a combination that the boundary did not show
            self.refused.append(str(error))
            say(str(error))
            self.study.tell(number, state=self.optuna.trial.TrialState.FAIL)
            return
        if job.state == RunStatus.waiting:
            yield job
        else:  # the values of an earlier trial again, or finished before its end was noted
            self.on_end(job)

    def _add(self, number: int, params: Mapping[str, Any]) -> SweepJob:
        checked = self.composer.job([*self.fixed, *to_overrides(params)])
        job = sweep_job(checked, self.folder, len(self.jobs) + 1, self.jobs)
        self.jobs.append(job)
        self.trial_numbers[job.number] = number
        return job

    def _newest(self) -> list[Any]:
        """Returns every trial, of one that was repeated the newest repetition."""
        by_root = {}
        for trial in self.study.trials:
            by_root[trial.user_attrs.get(RETRIES, trial.number)] = trial
        return list(by_root.values())

    def _queued(self) -> bool:
        return any(trial.state.name == "WAITING" for trial in self.study.trials)

    def _require_same_space(self) -> None:
        before = next(
            (trial.distributions for trial in reversed(self.study.trials) if trial.distributions), self.space
        )
        for name in sorted({*before, *self.space}):
            try:
                self.optuna.distributions.check_distribution_compatibility(before[name], self.space[name])
            except (KeyError, ValueError):
                raise UserError(
                    f"{os.path.relpath(self.folder)} holds a search over other values of {name}; "
                    "sweep=NAME starts another."
                ) from None


def import_optuna() -> Any:
    """Returns optuna; UserError with the command that installs it."""
    try:
        import optuna
    except ImportError as error:
        raise UserError(
            f'hydra/sweeper=optuna needs a package that is not installed ({error}): pip install "mft[search]"'
        ) from error
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    return optuna


def split(arguments: Sequence[str], params: Mapping[str, str]) -> tuple[list[str], dict[str, Any]]:
    """Returns (overrides of every job, {key: distribution}); what the command line sweeps stands above
    `params`."""
    given = {key_of(o): o for o in arguments}
    swept = {name: f"{name}={text}" for name, text in flat(params) if name not in given}
    swept |= {name: override for name, override in given.items() if is_sweep(override)}
    fixed = [override for name, override in given.items() if name not in swept]
    return fixed, {name: distribution(override) for name, override in swept.items()}


def flat(params: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yields (dotted key, text) of hydra.sweeper.params, written with dots or nested."""
    plain: Any = OmegaConf.to_container(params) if OmegaConf.is_config(params) else params
    for name, value in plain.items():
        if isinstance(value, Mapping):
            yield from flat(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value


def distribution(override: str) -> Any:
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
            values = list(value.range())
            return IntDistribution(values[0], values[-1], step=abs(value.step))
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
        raise UserError(
            "hydra/sweeper=optuna has nothing to search: name values, as "
            "optimizer.lr='tag(log, interval(1e-5, 1e-3))', or take experiment=search."
        )
    if settings["sampler"] not in SAMPLERS:
        raise UserError(
            f"hydra.sweeper.sampler={settings['sampler']}: unknown sampler"
            f"{nearest(str(settings['sampler']), SAMPLERS) or '.'} Allowed: {', '.join(SAMPLERS)}."
        )
    for name in ("n_trials", "startup_trials"):
        if not str(settings[name]).isdigit() or int(settings[name]) < 1:
            raise UserError(f"hydra.sweeper.{name}={settings[name]} must be at least 1.")
    if (launcher := cfg.hydra.runtime.choices["hydra/launcher"]) != "mft" or detect_rank() is not None:
        raise UserError(
            f"hydra/sweeper=optuna runs its jobs on this machine, through hydra/launcher=mft, not {launcher} "
            "(launch.jobs=2: two side by side)."
        )


def boundary_trials(space: Mapping[str, Any]) -> list[list[str]]:
    """Returns overrides that touch both ends of every interval and every choice at least once."""
    boundary = {name: extremes(values) for name, values in space.items()}
    count = max(map(len, boundary.values()))
    return [
        to_overrides({name: values[min(at, len(values) - 1)] for name, values in boundary.items()})
        for at in range(count)
    ]


def extremes(values: Any) -> list[Any]:
    """Returns the choices of a distribution, or its two ends."""
    return list(values.choices) if hasattr(values, "choices") else [values.low, values.high]


def to_overrides(params: Mapping[str, Any]) -> list[str]:
    """Returns the overrides of a trial's values."""
    return [f"{name}={f'{v:.{DIGITS}g}' if isinstance(v, float) else v}" for name, v in params.items()]
