"""Largest errors of the loss modes against reference numbers, and over layouts.

    python -m tests.loss                    the fixtures of tests/fixtures/losses, by kind
    python -m tests.loss FILE.json ...      other files of the same kinds, one by one
    python -m tests.loss layouts            every mode in every layout and backend, through the loop (minutes)

Ends with 1 where an error is beyond its tolerance.
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

import torch

from tests.loss.fixtures import FIXTURES, errors


def of_files(paths: list[Path]) -> bool:
    """Prints the errors of each file; returns whether all are within their tolerance."""
    good = True
    for path in paths:
        for quantity, (error, tolerance) in errors(path).largest.items():
            good &= (fine := error <= tolerance)
            print(
                f"{path.stem:<34} {quantity:<20} {error:9.1e}  (at most "
                f"{tolerance:.0e}){'' if fine else '  BEYOND'}"
            )
    return good


def of_kinds() -> bool:
    """Prints the largest error of each kind over its fixtures; returns whether all are within their
    tolerance."""
    largest: dict[tuple[str, str], tuple[float, float, int]] = {}
    for path in sorted(FIXTURES.glob("*.json")):
        for quantity, (error, tolerance) in errors(path).largest.items():
            key = (path.name.split("_")[0], quantity)
            before, _, count = largest.get(key, (0.0, 0.0, 0))
            largest[key] = (max(before, error), tolerance, count + 1)
    print(f"{'kind':<10} {'quantity':<20} {'largest error':>13}  {'tolerance':>9}  files")
    for (kind, quantity), (error, tolerance, count) in largest.items():
        print(f"{kind:<10} {quantity:<20} {error:13.1e}  {tolerance:9.0e}  {count:5}")
    return all(error <= tolerance for error, tolerance, _ in largest.values())


def of_layouts() -> bool:
    """Prints the largest relative difference from one padded micro-batch on one rank, for each mode and
    layout."""
    from tests.loss.modes import MODES
    from tests.loss.test_loop_layouts import LAYOUTS, SHARDED, differences, everything

    with tempfile.TemporaryDirectory() as folder:
        results = everything(Path(folder), sharded=MODES)
    print(f"{'mode':<18}" + "".join(f"{name:>11}" for name in [*LAYOUTS, *SHARDED]))
    worst = 0.0
    for mode in MODES:
        line = f"{mode:<18}"
        for layout in [*LAYOUTS, *SHARDED]:
            found = max(differences(results[layout][mode], results["1x1 pad"][mode]).values())
            worst = max(worst, found)
            line += f"{found:11.0e}"
        print(line)
    return worst <= 1e-6


if __name__ == "__main__":
    torch.set_num_threads(1)
    given = sys.argv[1:]
    if given == ["layouts"]:
        good = of_layouts()
    else:
        good = of_files([Path(name) for name in given]) if given else of_kinds()
    sys.exit(0 if good else 1)
