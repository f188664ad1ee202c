"""`hydra/sweeper=optuna`: a sweep whose values Optuna proposes from what earlier jobs have reached.

The study lies in the sweep's folder (`search.journal`), so the same command goes on with it: finished trials are known,
unfinished ones go on from their checkpoint, failed ones are tried again. A job's folder is its identity, as in grids.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

from mft.config.overrides import key_of
from mft.errors import UserError, nearest
from mft.files.json_file import read_json, write_json
from mft.launch import job
from mft.launch.launch import place
from mft.sweep import display
from mft.sweep.command import Shown, is_sweep, remove_if_unused, taken
from mft.sweep.jobs import Composer, checked, finish, folder_of, judge, refuse_another_version, side_by_side, task_of
from mft.sweep.pool import Task

JOURNAL = "search.journal"
SAMPLERS = ("tpe", "random")
DIGITS = 4
"""Significant digits of a proposed value: what a person can read and repeat; the difference is far below the noise."""

RETRIES = "retries"
"""A trial's attribute: the number of the failed trial that it repeats."""


def run(cfg: DictConfig, loader: Any, arguments: Sequence[str], settings: Mapping[str, Any], dry_run: bool) -> Any:
    """Runs the trials that are left; returns (values, objective) of the best. UserError if any failed."""
    optuna = installed()
    folder = folder_of(cfg)
    refuse_another_version(folder)
    try:
        fixed, space = split(arguments, settings.get("params") or {})
        refuse(cfg, settings, space)
        composer = Composer(cfg, loader, starts=not dry_run)
        corner_jobs = checked(composer, [[*fixed, *corner] for corner in corners(space)])
    except UserError:
        remove_if_unused(folder)
        raise
    if dry_run:
        known = len(read_json(folder / "search.json").get("trials") or ())
        display.say(f"search {display.shown(folder)}: {settings['n_trials']} trials, {known} of them done")
        for name, distribution in space.items():
            display.say(f"  {name:<24} {distribution}")
        display.say(f"{len(corner_jobs)} jobs at the edges of this space were checked; nothing was started")
        remove_if_unused(folder)
        raise Shown
    with taken(cfg, folder):
        search = Search(optuna, folder, space, fixed, composer, settings, corner_jobs[0].cfg.launch.jobs)
        display.start(search.tasks, folder)
        signum = side_by_side(
            search.waiting(), search.tasks, folder, corner_jobs[0].cfg, search.jobs, search.total, search.ended
        )
        finish(search.tasks, folder, signum)
        best = search.leave()
    judge(search.tasks)
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
        jobs: int,
    ):
        self.optuna, self.folder, self.space, self.fixed = optuna, folder, dict(space), list(fixed)
        self.composer, self.jobs, self.total = composer, jobs, int(settings["n_trials"])
        self.tasks: list[Task] = []
        self.numbers: dict[int, int] = {}  # of a task -> of its trial
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
            self.study.sampler = optuna.samplers.TPESampler(seed=seed, n_startup_trials=first, constant_liar=jobs > 1)
        self._refuse_another_space()
        for trial in self._newest():
            if trial.state.name == "COMPLETE":
                self._task(trial.number, trial.params)
            elif trial.state.name == "FAIL":
                root = trial.user_attrs.get(RETRIES, trial.number)
                self.study.enqueue_trial(trial.params, user_attrs={RETRIES: root})

    def waiting(self) -> Iterator[Task]:
        """Yields jobs: those that were interrupted, those that failed before, then new ones until there are enough."""
        for trial in self._newest():
            if trial.state.name == "RUNNING":
                yield from self._next(trial.number, trial.params)
        while self._queued() or len(self._newest()) < self.total:
            trial = self.study.ask(self.space)
            yield from self._next(trial.number, trial.params)

    def ended(self, task: Task) -> None:
        """Tells the study how a job went; a stopped one stays open and goes on with the next command."""
        number = self.numbers[task.number]
        if task.state in ("finished", "skipped"):
            self.study.tell(number, job.objective(read_json(task.folder / "summary.json")))
        elif task.state in ("pruned", "same") and task.best is not None:
            self.study.tell(number, task.best)  # one that was ended early counts with the best it had
        elif task.state == "failed":
            self.study.tell(number, state=self.optuna.trial.TrialState.FAIL)

    def leave(self) -> dict[str, Any]:
        """Writes search.json, the values and the objective of every trial, and says which was the best."""
        rows = [
            {"trial": t.number, "state": t.state.name.lower(), "objective": t.value, "values": t.params}
            for t in self._newest()
        ]
        done = sorted((row for row in rows if row["objective"] is not None), key=lambda row: row["objective"])
        found = {"best": done[0] if done else None, "trials": rows}
        write_json(self.folder / "search.json", found)
        best = display.best_of(self.tasks)
        if best is not None:
            display.say(
                f"best of {len(done)} trials: {best.best:.4f} with {best.job.label}  ({display.shown(best.folder)})"
            )
            display.say("one seed a trial: repeat the best few with train.seed=1,2,3 before you believe their order")
        return found

    def _next(self, number: int, params: Mapping[str, Any]) -> Iterator[Task]:
        """Yields the job of a trial if it has to run."""
        try:
            task = self._task(number, params)
        except UserError as error:  # a combination that the edges did not show
            self.refused.append(str(error))
            display.say(str(error))
            self.study.tell(number, state=self.optuna.trial.TrialState.FAIL)
            return
        if task.state == "waiting":
            yield task
        else:  # the values of an earlier trial again, or finished before its end was noted
            self.ended(task)

    def _task(self, number: int, params: Mapping[str, Any]) -> Task:
        current = self.composer.job([*self.fixed, *said(params)])
        task = task_of(current, self.folder, len(self.tasks) + 1, self.tasks)
        self.tasks.append(task)
        self.numbers[task.number] = number
        return task

    def _newest(self) -> list[Any]:
        """Returns every trial, of one that was repeated the newest repetition."""
        by_root = {}
        for trial in self.study.trials:
            by_root[trial.user_attrs.get(RETRIES, trial.number)] = trial
        return list(by_root.values())

    def _queued(self) -> bool:
        return any(trial.state.name == "WAITING" for trial in self.study.trials)

    def _refuse_another_space(self) -> None:
        before = next((trial.distributions for trial in reversed(self.study.trials) if trial.distributions), self.space)
        for name in sorted({*before, *self.space}):
            try:
                self.optuna.distributions.check_distribution_compatibility(before[name], self.space[name])
            except (KeyError, ValueError):
                raise UserError(
                    f"{display.shown(self.folder)} holds a search over other values of {name}; "
                    "sweep=NAME starts another."
                ) from None


def installed() -> Any:
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
    """Returns (overrides of every job, {key: distribution}); what the command line sweeps stands above `params`."""
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
    """Returns the distribution of `key=interval(1,2)`, `range(1,9)`, `choice(a,b)` or `a,b`, with tag(log, …)."""
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


def refuse(cfg: DictConfig, settings: Mapping[str, Any], space: Mapping[str, Any]) -> None:
    """Refuses what cannot be searched."""
    if not space:
        raise UserError(
            "hydra/sweeper=optuna has nothing to search: name values, as "
            "optimizer.lr='tag(log, interval(1e-5, 1e-3))', or take experiment=search."
        )
    if settings["sampler"] not in SAMPLERS:
        raise UserError(
            f"hydra.sweeper.sampler={settings['sampler']}: allowed are {', '.join(SAMPLERS)}"
            f"{nearest(str(settings['sampler']), SAMPLERS) or '.'}"
        )
    for name in ("n_trials", "startup_trials"):
        if not str(settings[name]).isdigit() or int(settings[name]) < 1:
            raise UserError(f"hydra.sweeper.{name}={settings[name]} must be at least 1.")
    if (launcher := cfg.hydra.runtime.choices["hydra/launcher"]) != "mft" or place() is not None:
        raise UserError(
            f"hydra/sweeper=optuna runs its jobs on this machine, through hydra/launcher=mft, not {launcher} "
            "(launch.jobs=2: two side by side)."
        )


def corners(space: Mapping[str, Any]) -> list[list[str]]:
    """Returns overrides that touch both ends of every interval and every choice at least once."""
    ends = {name: edges(values) for name, values in space.items()}
    count = max(len(values) for values in ends.values())
    return [said({name: values[min(at, len(values) - 1)] for name, values in ends.items()}) for at in range(count)]


def edges(values: Any) -> list[Any]:
    """Returns the choices of a distribution, or its two ends."""
    return list(values.choices) if hasattr(values, "choices") else [values.low, values.high]


def said(params: Mapping[str, Any]) -> list[str]:
    """Returns the overrides of a trial's values."""
    return [f"{name}={f'{v:.{DIGITS}g}' if isinstance(v, float) else v}" for name, v in params.items()]
