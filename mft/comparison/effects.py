"""Which of the swept keys matters: the effect of each value, and each key's share of the variance.

A linear model of main effects, one value a run: what it leaves over are interactions of keys, and seeds.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from mft.comparison.compare import Comparison
from mft.comparison.settings import SEED

if TYPE_CHECKING:
    import pandas

MANY = 6
"""Different numbers from which a key counts as searched: its values are taken in `BINS` parts."""

BINS = 4


@dataclass(frozen=True)
class Level:
    """One value of a key, or a range of values."""

    value: str
    runs: int
    effect: float
    """How far runs with it lie from the mean of all, the other keys being equal, in units of the metric."""
    low: float
    """Lower end of its 95 % interval; NaN where there are no more runs than effects."""
    high: float


@dataclass(frozen=True)
class Effect:
    """One key."""

    key: str
    share: float
    """Part of the variance between runs that only this key explains, 0 to 1."""
    p: float
    """Of no effect at all (F-test); NaN where there are no more runs than effects."""
    levels: tuple[Level, ...]


def effects(comparison: Comparison) -> tuple[list[Effect], float]:
    """Returns the keys that differ, the one that explains most first, and the share that none explains.

    Keys that change only together with others have a share of 0 and no levels. A key of which one value does
    so (loss.tau, which is not set where loss is mean) has a share, but no levels: what belongs to which key
    is not known. ([], NaN) below three runs, or without any variance.
    """
    import numpy as np

    table = _table(comparison)
    keys = [key for key in table.columns if key != "value" and table[key].nunique() > 1]
    if len(table) < 3 or not keys or not table["value"].var() > 0:
        return [], math.nan
    full = _fit(table, keys)
    total = float(full.centered_tss)
    found = []
    for key in keys:
        rest = _fit(table, [other for other in keys if other != key])
        explained = max(0.0, float(rest.ssr - full.ssr))
        alone = rest.df_resid > full.df_resid  # it changes also where the others stay as they are
        p = math.nan
        if alone and full.df_resid > 0:
            # runs of equal values leave no noise: F is infinite, or 0/0 where the key explains nothing either
            with np.errstate(divide="ignore", invalid="ignore"):
                p = float(full.compare_f_test(rest)[1])
        levels = _levels(table, keys, key, full) if alone else ()
        found.append(Effect(key, explained / total if alone else 0.0, p, tuple(levels)))
    return sorted(found, key=lambda effect: -effect.share), float(full.ssr) / total


def _table(comparison: Comparison) -> pandas.DataFrame:
    """Returns one line for each run with a value: the value, and its keys as text."""
    import pandas as pd

    settings = comparison.settings
    keys = list(dict.fromkeys(key for s in settings for key in (*s.keys, *comparison.pairing)))
    judged = [one for setting in settings for one in setting.judged]
    lines = [
        {key: one.run.values.get(key, "-") for key in keys} | {"value": value}
        for one in judged
        if (value := one.value(comparison.metric)) is not None
    ]
    # object: pandas' own type of text refuses half a surrogate pair, as file names may have
    table = pd.DataFrame(lines, columns=[*keys, "value"], dtype=object)
    table["value"] = table["value"].astype(float)
    for key in keys:
        numbers = pd.to_numeric(table[key], errors="coerce")
        if key != SEED and numbers.notna().all() and numbers.nunique() >= MANY:
            parts = pd.qcut(numbers, BINS, labels=False, duplicates="drop")
            ends = numbers.groupby(parts).agg(["min", "max"])
            table[key] = [f"{ends['min'][part]:g} to {ends['max'][part]:g}" for part in parts]
    return table


def _design(table: pandas.DataFrame, keys: Sequence[str]) -> pandas.DataFrame:
    """Returns columns of 1, 0 and -1: one for each value of a key but its last, whose effects add to 0."""
    import pandas as pd

    columns: dict[str, object] = {"all": 1.0}
    for key in keys:
        *values, last = sorted(table[key].unique())
        of_last = (table[key] == last).astype(float)
        for value in values:
            columns[f"{key}={value}"] = (table[key] == value).astype(float) - of_last
    return pd.DataFrame(columns, index=table.index)


def _fit(table: pandas.DataFrame, keys: Sequence[str]) -> Any:
    """Returns statsmodels' results of the least squares fit."""
    import statsmodels.api as sm
    from statsmodels.tools.sm_exceptions import SingularMatrixWarning

    with warnings.catch_warnings():  # of keys that change together, which `effects` tells
        warnings.simplefilter("ignore", SingularMatrixWarning)
        return sm.OLS(table["value"], _design(table, keys)).fit()


def _levels(table: pandas.DataFrame, keys: Sequence[str], key: str, full: Any) -> list[Level]:
    """Returns the effect of each value of a key, [] where the runs do not determine it. full: of all keys."""
    import numpy as np

    design = _design(table, keys)
    columns = list(design.columns)
    # of what the fit determines: all else is a choice of least squares, and no effect
    _, sizes, directions = np.linalg.svd(design.to_numpy(), full_matrices=False)
    known = directions[sizes > 1e-9 * sizes.max()]
    values = sorted(table[key].unique(), key=_order)
    *named, last = sorted(table[key].unique())
    result = []
    for value in values:
        contrast = np.zeros(len(columns))
        for other in named:
            contrast[columns.index(f"{key}={other}")] = -1.0 if value == last else float(other == value)
        if not np.allclose(contrast @ known.T @ known, contrast, atol=1e-6):
            return []
        low = high = math.nan
        if full.df_resid > 0:
            low, high = map(float, full.t_test(contrast).conf_int()[0])
        runs, effect = int((table[key] == value).sum()), float(contrast @ full.params.to_numpy())
        result.append(Level(value, runs, effect, low, high))
    return result


def _order(value: str) -> tuple[bool, float, str]:
    try:
        return False, float(value.split(" to ")[0]), value
    except ValueError:
        return True, 0.0, value
