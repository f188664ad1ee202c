"""How often the intervals of `mft compare` hold the true difference, and how often it names a false winner.

Sweeps are drawn from a model with three parts that may be switched off: how well a seed happens to do in a
setting, how well a setting happens to do on a row, and both together. The true difference of two settings is
the one over all seeds and all rows that there might be. All goes through `mft.comparison.statistics`.

  python -m benchmarks.comparison                 2,000 sweeps a line
"""

from __future__ import annotations

import argparse
from functools import partial
from typing import NamedTuple

import numpy as np

from mft.comparison.statistics import Difference, PairedRows, corrected, paired

TASKS = 2


class Found(NamedTuple):
    """Parts of all sweeps, or of all comparisons in them."""

    coverage: float
    """Intervals of two settings, chosen beforehand, that hold the true difference."""
    coverage_of_best: float
    """The same of all settings against the one that came out best."""
    false_winners: float
    """Sweeps in which a winner is named that is not truly the best one."""
    false_verdicts: float
    """Sweeps in which some setting is called worse than the best one without being so."""
    true_winners: float
    """Sweeps in which the truly best setting is named."""


def simulate(
    sweeps: int,
    settings: int,
    seeds: int,
    of_seeds: float,
    of_rows: float,
    effect: float = 0.0,
    rows: int = 100,
    known_rows: bool = True,
) -> Found:
    """Returns what became of so many sweeps.

    of_seeds, of_rows: standard deviations of the loss over seeds and over rows of each setting, in nats per
    token; effect: by how much the first setting is truly better than the others; rows: of each of two tasks;
    known_rows: whether the losses of single rows were kept.
    """
    random = np.random.default_rng(0)
    truth = np.zeros(settings)
    truth[0] = -effect
    covered, of_best, winners, verdicts, right = 0, [], 0, 0, 0
    for _ in range(sweeps):
        tokens_KN, loss_gnKN = _draw(random, truth, seeds, of_seeds, of_rows, rows)
        value_gn = (loss_gnKN.sum(-1) / tokens_KN.sum(-1)).mean(-1)

        difference = partial(_difference, value_gn, loss_gnKN, tokens_KN if known_rows else None)
        fixed = difference(1, 0)
        covered += fixed.low <= truth[1] - truth[0] <= fixed.high
        best = int(value_gn.mean(1).argmin())
        others = [g for g in range(settings) if g != best]
        found = corrected([difference(g, best) for g in others], settings * (settings - 1) // 2)
        of_best += [d.low <= truth[g] - truth[best] <= d.high for g, d in zip(others, found, strict=True)]
        verdicts += any(d.told_apart and truth[g] <= truth[best] for g, d in zip(others, found, strict=True))
        if all(d.told_apart for d in found):
            truly_best = all(truth[best] < truth[g] for g in others)
            winners, right = winners + (not truly_best), right + truly_best
    return Found(
        covered / sweeps, float(np.mean(of_best)), winners / sweeps, verdicts / sweeps, right / sweeps
    )


def _difference(
    value_gn: np.ndarray, loss_gnKN: np.ndarray, tokens_KN: np.ndarray | None, one: int, other: int
) -> Difference:
    loss_nKN = (loss_gnKN[one] - loss_gnKN[other]) / TASKS
    known = [] if tokens_KN is None else [PairedRows(loss_nKN[:, k], tokens_KN[k]) for k in range(TASKS)]
    return paired(value_gn[one] - value_gn[other], known)


def _draw(
    random: np.random.Generator, truth: np.ndarray, seeds: int, of_seeds: float, of_rows: float, rows: int
) -> tuple[np.ndarray, np.ndarray]:
    """Returns tokens [K, N] and loss sums [settings, seeds, K, N] of the rows of one sweep."""
    shape = (len(truth), seeds, TASKS, rows)
    tokens_KN = random.integers(5, 60, shape[2:]).astype(float)
    # What all settings share: how hard a row is, and how good the order of data of a seed.
    loss = random.normal(2.0, 0.5, (1, 1, *shape[2:])) + random.normal(0, 0.02, (1, seeds, 1, 1))
    loss = loss + truth[:, None, None, None] + random.normal(0, 1, (*shape[:2], 1, 1)) * of_seeds
    loss = loss + random.normal(0, 1, (shape[0], 1, *shape[2:])) * of_rows
    loss = loss + random.normal(0, 1, shape) * of_rows / 2  # a row under one seed
    return tokens_KN, loss * tokens_KN


def main() -> None:
    """Prints the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--sweeps", type=int, default=2000)
    sweeps = parser.parse_args().sweeps
    print(
        "settings seeds  sd: seeds rows  effect | coverage  of best  false winner  false verdict  true winner"
    )
    variances = {"seeds": (0.01, 0.0), "rows": (0.0, 0.1), "both": (0.01, 0.1)}
    cases = [(settings, seeds, 0.0) for settings in (2, 4) for seeds in (1, 2, 3, 5)] + [(4, 5, 0.05)]
    for settings, seeds, effect in cases:
        for name, (of_seeds, of_rows) in variances.items():
            if seeds == 1 and name != "rows":  # an interval over rows makes no claim on seeds
                continue
            found = simulate(sweeps, settings, seeds, of_seeds, of_rows, effect)
            line = f"{settings:8} {seeds:5}  {of_seeds:9g} {of_rows:4g}  {effect:6g} | {found.coverage:8.3f} "
            line += f"{found.coverage_of_best:8.3f} {found.false_winners:13.3f} {found.false_verdicts:14.3f} "
            print(f"{line}{found.true_winners:12.3f}", flush=True)


if __name__ == "__main__":
    main()
