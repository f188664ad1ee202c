"""Results of other tools as metrics of runs: lm-evaluation-harness and EvalPlus, from files they write."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from mft.errors import UserError, nearest
from mft.runs.results import Run

LAYOUTS = (
    'Expected the results_….json of lm-evaluation-harness ({"results": {task: {"acc,none": …}}}) or the '
    '…eval_results.json of EvalPlus ({"eval": …, "pass_at_k": …}).'
)

MODELS = ("peft", "delta", "pretrained", "path", "model")
"""Arguments of lm-evaluation-harness that say which model was measured; the first that is given counts."""

PASSED = ("pass", "success")
"""What EvalPlus calls a solution that passed its tests, now and in its first versions."""

KS = (1, 10, 100)
"""The k of EvalPlus's pass@k."""


def add_results(runs: Sequence[Run], spec: str) -> str:
    """Adds the results in a file to the metrics of the run that they are of; returns a sentence on that.

    spec: FILE, whose model lies in the folder of a run, or RUN=FILE, where RUN is the name, the folder or
    `Run.where` of one. Raises UserError for a file that is damaged, of another layout, or of none of the
    runs, and for a metric that the run has already.
    """
    named, file = _split(spec)
    content = _content(file)
    run = _named(runs, named) if named else _measured(runs, content, file)
    metrics = dict(_metrics(content))
    if not metrics:
        raise UserError(f"--with {file}: holds no result of any task. {LAYOUTS}")
    if double := [name for name in metrics if name in set(run.names())]:
        raise UserError(
            f"--with {file}: {run.where} has {double[0]} already; leave one of the two files out."
        )
    run.metrics.update(metrics)
    return f"{file}: {', '.join(metrics)} of {run.where}"


def _split(spec: str) -> tuple[str, Path]:
    """Returns (RUN, FILE) of RUN=FILE; both may contain an equals sign."""
    cuts = [place for place, letter in enumerate(spec) if letter == "="]
    pairs = [("", spec), *((spec[:cut], spec[cut + 1 :]) for cut in cuts)]
    named, file = next((pair for pair in pairs if Path(pair[1]).is_file()), pairs[min(1, len(cuts))])
    if Path(file).is_dir():
        inside = sorted(Path(file).rglob("*results*.json"))
        hint = f"did you mean {inside[-1]}?" if inside else LAYOUTS
        raise UserError(f"--with {spec}: {file} is a folder; {hint}")
    if not Path(file).is_file():
        beside = [path.name for path in Path(file).parent.glob("*.json")]
        raise UserError(f"--with {spec}: there is no file {file}{nearest(Path(file).name, beside) or '.'}")
    return named, Path(file)


def _content(file: Path) -> dict[str, Any]:
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"--with {file}: cannot be read as JSON ({error}). {LAYOUTS}") from error
    if not isinstance(content, dict) or not any(
        isinstance(content.get(key), dict) for key in ("results", "eval")
    ):
        raise UserError(f"--with {file}: is of an unknown layout. {LAYOUTS}")
    return content


def _named(runs: Sequence[Run], named: str) -> Run:
    """Returns the run that a person names; UserError for none, or for several."""
    folder = Path(named).resolve()
    matching = [run for run in runs if named == run.where or (run.folder and run.folder.resolve() == folder)]
    matching = matching or [run for run in runs if named in (run.name, Path(run.where).name)]
    if len(matching) == 1:
        return matching[0]
    if matching:
        raise UserError(f"--with {named}=…: {_listed(matching)} are called so; name the folder of one.")
    known = [name for run in runs for name in (run.name, run.where)]
    raise UserError(f"--with {named}=…: none of the runs is called so{nearest(named, known) or '.'}")


def _measured(runs: Sequence[Run], content: Mapping[str, Any], file: Path) -> Run:
    """Returns the run whose folder holds the model that was measured."""
    for place in _models(content):
        path = Path(os.path.expanduser(place)).resolve()
        for run in runs:
            # of a run in a store, its folder may be on another machine, where it was measured
            wrote = run.place.rpartition(" ")[0]
            if (run.folder and path.is_relative_to(run.folder.resolve())) or (
                wrote and Path(place).is_relative_to(wrote)
            ):
                return run
    said = ", ".join(dict.fromkeys(_models(content)))
    why = (
        f"its model {said} is not in the folder of a run" if said else "it does not say which model it is of"
    )
    raise UserError(f"--with {file}: {why}; write RUN={file} with one of the runs: {_listed(runs)}.")


def _listed(runs: Sequence[Run], most: int = 6) -> str:
    more = f" and {len(runs) - most} more" if len(runs) > most else ""
    return ", ".join(run.where for run in runs[:most]) + more


def _models(content: Mapping[str, Any]) -> list[str]:
    """Returns what lm-evaluation-harness records as the model: text `a=b,c=d`, in new versions an object."""
    config = content.get("config")
    arguments = config.get("model_args") if isinstance(config, dict) else None
    if isinstance(arguments, str):
        arguments = dict(part.partition("=")[::2] for part in arguments.split(","))
    values = arguments if isinstance(arguments, dict) else {}
    return [str(value) for key in MODELS if (value := values.get(key))][:1]


def _metrics(content: Mapping[str, Any]) -> Iterator[tuple[str, float]]:
    """Yields (name, value) of the metrics in a file: hellaswag/acc, humaneval/pass@1."""
    if isinstance(content.get("results"), dict):
        yield from _of_lm_eval(content["results"])
    else:
        yield from _of_evalplus(content)


def _of_lm_eval(results: Mapping[str, Any]) -> Iterator[tuple[str, float]]:
    for task, values in results.items():
        if not isinstance(values, dict):
            continue
        # `metric,filter` since version 0.4; what has no filter there is not a metric (alias, sample_len)
        filtered = any("," in name for name in values)
        for name, value in values.items():
            metric, comma, chosen = name.partition(",")
            number = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
            if not number or metric.endswith("_stderr") or bool(comma) != filtered:
                continue
            # The metric last: its name tells the direction.
            yield "/".join([task, *([chosen] if chosen not in ("", "none") else []), metric]), float(value)


def _of_evalplus(content: Mapping[str, Any]) -> Iterator[tuple[str, float]]:
    solutions = content["eval"]
    name = str(next(iter(solutions), "evalplus/")).partition("/")[0].lower()  # HumanEval/0, Mbpp/2
    given = content.get("pass_at_k")
    for tests, suffix in (("base", ""), ("plus", "+")):
        values = given.get(tests) if isinstance(given, dict) else _pass_at_k(solutions, tests)
        for metric, value in (values or {}).items():
            if isinstance(value, int | float) and math.isfinite(value):
                yield f"{name}{suffix}/{metric}", float(value)


def _pass_at_k(solutions: Mapping[str, Any], tests: str) -> dict[str, float]:
    """Returns {pass@k: value} of files from before EvalPlus wrote it into them.

    With n solutions of a problem, c of them right: 1 - C(n - c, k) / C(n, k), the mean over problems.
    """
    counts = [_right(problem, tests) for problem in solutions.values()]
    if not counts or any(count is None for count in counts):
        return {}
    pairs = [count for count in counts if count is not None]
    values = {}
    for k in KS:
        if all(n >= k for n, _ in pairs):
            passed = [1 - math.comb(n - c, k) / math.comb(n, k) for n, c in pairs]
            values[f"pass@{k}"] = sum(passed) / len(passed)
    return values


def _right(problem: Any, tests: str) -> tuple[int, int] | None:
    """Returns (solutions, those that passed the tests) of a problem; None for another layout.

    Both the base tests and the further ones have to be passed for `plus`.
    """
    kinds = ("base",) if tests == "base" else ("base", "plus")
    if isinstance(problem, list):  # since 0.2: an object for each solution
        states = [[one.get(f"{kind}_status") for kind in kinds] for one in problem if isinstance(one, dict)]
    elif isinstance(problem, dict) and all(isinstance(problem.get(kind), list) for kind in kinds):
        pairs = zip(*(problem[kind] for kind in kinds), strict=False)
        states = [[one[0] if isinstance(one, list) and one else None for one in pair] for pair in pairs]
    else:
        return None
    if not states or any(None in state for state in states):
        return None
    return len(states), sum(all(one in PASSED for one in state) for state in states)
