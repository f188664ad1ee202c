"""`hydra/sweeper=optuna`: a sweep whose values Optuna proposes from the results of earlier jobs.

The study is stored in the sweep's folder (`search.journal`), so the same command resumes it: finished trials
are kept, interrupted ones resume from their checkpoint, failed ones are tried again. A job's folder is its
identity, as in grids.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mft.console.screen import say
from mft.errors import UserError
from mft.files.json_file import read_json, write_json
from mft.launch.job import objective
from mft.run_folder import RunStatus
from mft.sweep import display, names
from mft.sweep.composer import Composer, check_all
from mft.sweep.folder import DryRunDone, SweepContext, checking, taken
from mft.sweep.jobs import finish, require_success, run_side_by_side, sweep_job
from mft.sweep.pool import SweepJob
from mft.sweep.search_space import boundary_trials, check_settings, split, to_overrides

if TYPE_CHECKING:
    from optuna.distributions import BaseDistribution
    from optuna.trial import FrozenTrial, Trial

JOURNAL = "search.journal"
RETRIES = "retries"
"""A trial's attribute: the number of the failed trial that it repeats."""


def run(context: SweepContext, arguments: Sequence[str], settings: Mapping[str, Any]) -> dict[str, Any]:
    """Runs the trials that are left; returns the content of search.json. UserError if any failed.

    arguments: the overrides of the command line; settings: of hydra.sweeper.
    """
    try:
        import optuna
    except ImportError as error:
        raise UserError(f'hydra/sweeper=optuna needs pip install "mft[search]" ({error})') from error
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    folder = context.folder
    with checking(folder):
        fixed, space = split(arguments, settings.get("params") or {})
        check_settings(context.cfg, settings, space)
        composer = Composer(context)
        boundary = check_all(composer, [[*fixed, *trial] for trial in boundary_trials(space)])
        if context.dry_run:
            done = len(read_json(folder / "search.json").get("trials") or ())
            say(f"search {os.path.relpath(folder)}: {settings['n_trials']} trials, {done} of them done")
            for name, values in space.items():
                say(f"  {name:<24} {values}")
            say(f"{len(boundary)} jobs at the boundary of this space were checked; nothing was started")
            raise DryRunDone
    job_cfg = boundary[0].cfg
    at_once = job_cfg.launch.jobs
    with taken(context.cfg, folder):
        search = Search(folder, space, fixed, composer, settings, at_once)
        jobs = search.jobs
        display.start(jobs, folder)
        waiting, total = search.waiting(), search.total
        signum = run_side_by_side(waiting, jobs, folder, job_cfg, at_once, total, search.on_end)
        finish(jobs, folder, signum)
        results = search.write_results()
    require_success(jobs)
    if search.refused:
        raise UserError("\n".join(search.refused))
    return results


class Search:
    """A study and its jobs."""

    def __init__(
        self,
        folder: Path,
        space: Mapping[str, BaseDistribution],
        fixed: Sequence[str],
        composer: Composer,
        settings: Mapping[str, Any],
        at_once: int,
    ):
        """Opens the study in the folder, adds its finished trials as jobs and queues its failed ones."""
        import optuna
        from optuna.storages.journal import JournalFileBackend

        self.folder, self.space, self.fixed = folder, dict(space), fixed
        self.composer, self.total = composer, int(settings["n_trials"])
        self.jobs: list[SweepJob] = []
        self.trial_numbers: dict[int, int] = {}
        """Number of a job → number of its trial."""
        self.names = names.recorded(folder)
        """Name of a job's folder → name of the job."""
        self.refused: list[str] = []
        """Why a proposed combination could not run."""
        storage = optuna.storages.JournalStorage(JournalFileBackend(str(folder / JOURNAL)))
        self.study = optuna.create_study(study_name="search", storage=storage, load_if_exists=True)
        # with a fixed seed a restarted search would draw the values of its first trials again
        seed = None if settings["seed"] is None else int(settings["seed"]) + len(self.study.trials)
        if settings["sampler"] == "random":
            self.study.sampler = optuna.samplers.RandomSampler(seed=seed)
        else:
            # constant_liar: jobs side by side are not to get the same values
            self.study.sampler = optuna.samplers.TPESampler(
                seed=seed, n_startup_trials=int(settings["startup_trials"]), constant_liar=at_once > 1
            )
        self.failed = optuna.trial.TrialState.FAIL
        self._require_same_space()
        for trial in self._newest():
            if trial.state.name == "COMPLETE":
                self._add(trial)
            elif trial.state.name == "FAIL":
                root = trial.user_attrs.get(RETRIES, trial.number)
                self.study.enqueue_trial(trial.params, user_attrs={RETRIES: root})

    def waiting(self) -> Iterator[SweepJob]:
        """Yields jobs: the interrupted ones, those that failed before, then new ones up to n_trials."""
        for trial in self._newest():
            if trial.state.name == "RUNNING":
                yield from self._next(trial)
        while len(self._newest()) < self.total or any(t.state.name == "WAITING" for t in self.study.trials):
            yield from self._next(self.study.ask(self.space))  # a queued trial, if there is one

    def on_end(self, job: SweepJob) -> None:
        """Tells the study how a job ended; a stopped one stays open and is resumed by the next command."""
        number = self.trial_numbers[job.number]
        if job.state in (RunStatus.finished, RunStatus.skipped):
            self.study.tell(number, objective(read_json(job.folder / "summary.json")))
        elif job.state in (RunStatus.pruned, RunStatus.same) and job.best is not None:
            self.study.tell(number, job.best)  # one that ended early counts with the best it had
        elif job.state == RunStatus.failed:
            self.study.tell(number, state=self.failed)

    def write_results(self) -> dict[str, Any]:
        """Writes search.json, the values and the objective of every trial, and prints which was the best."""
        trials: list[dict[str, Any]] = [
            {"trial": t.number, "state": t.state.name.lower(), "objective": t.value, "values": t.params}
            for t in self._newest()
        ]
        done = [trial for trial in trials if trial["objective"] is not None]
        best_trial = min(done, key=lambda trial: float(trial["objective"]), default=None)
        results = {"best": best_trial, "trials": trials}
        write_json(self.folder / "search.json", results)
        best = display.best_of(self.jobs)
        if best is not None:
            path = os.path.relpath(best.folder)
            say(f"best of {len(done)} trials: {best.best:.4f} with {best.checked.label}  ({path})")
            say("one seed a trial: repeat the best few with train.seed=1,2,3 before trusting their ranking")
        return results

    def _next(self, trial: Trial | FrozenTrial) -> Iterator[SweepJob]:
        """Yields the job of a trial if it has to run."""
        try:
            job = self._add(trial)
        except UserError as error:  # a combination inside the boundary that was checked
            self.refused.append(str(error))
            say(str(error))
            self.study.tell(trial.number, state=self.failed)
            return
        if job.state == RunStatus.waiting:
            yield job
        else:  # the values of an earlier trial again, or killed between its end and `on_end`
            self.on_end(job)

    def _add(self, trial: Trial | FrozenTrial) -> SweepJob:
        checked = self.composer.job([*self.fixed, *to_overrides(trial.params)])
        checked = names.next_named(checked, self.composer.swept(checked), self.folder, self.names)
        job = sweep_job(checked, self.folder, len(self.jobs) + 1, self.jobs)
        self.jobs.append(job)
        self.trial_numbers[job.number] = trial.number
        return job

    def _newest(self) -> list[FrozenTrial]:
        """Returns every trial, of one that was repeated the newest repetition."""
        return list({t.user_attrs.get(RETRIES, t.number): t for t in self.study.trials}.values())

    def _require_same_space(self) -> None:
        from optuna.distributions import check_distribution_compatibility

        earlier = [trial.distributions for trial in self.study.trials if trial.distributions]
        before = earlier[-1] if earlier else self.space
        for name in sorted({*before, *self.space}):
            try:
                check_distribution_compatibility(before[name], self.space[name])
            except (KeyError, ValueError):
                folder = os.path.relpath(self.folder)
                raise UserError(f"{folder} searches other values of {name}; add sweep=NAME.") from None
