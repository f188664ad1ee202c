"""Plays N random faults on tiny real runs, and judges each against the same run without a fault.

    python -m benchmarks.faults 300 [--seed 1] [--first 1] [--only KIND] [--record FILE] [--keep]

A fault is a function of seed, number and kind. The table counts kinds and outcomes; for every failure the
command follows that plays exactly this one again. Exit code 1 where anything was lost.
"""

from __future__ import annotations

import argparse
import shutil
import signal
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path

from benchmarks.faults.campaign import Result, kind_of, play, record, table
from benchmarks.faults.kinds import KINDS
from benchmarks.faults.processes import end_all, prepare_server
from benchmarks.faults.setups import Bench


def main() -> int:
    """Reads the command line and plays; returns the exit code."""
    kinds = "\n".join(f"  {kind.name:<26} {kind.explained}" for kind in KINDS)
    line = argparse.ArgumentParser(
        prog="python -m benchmarks.faults", description=__doc__, epilog=f"kinds:\n{kinds}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    line.add_argument("faults", type=int, help="how many")
    line.add_argument("--seed", type=int, default=1)
    line.add_argument("--first", type=int, default=1, help="the number of the first one")
    line.add_argument(
        "--only",
        action="append",
        choices=[kind.name for kind in KINDS],
        metavar="KIND",
        help="only this kind",
    )
    line.add_argument("--record", type=Path, help="append each result to this file, a JSON object a line")
    line.add_argument("--keep", action="store_true", help="keep the folders of all faults")
    line.add_argument("--side-by-side", type=int, default=2, metavar="N", help="faults played at once")
    given = line.parse_args()
    chosen = [kind for kind in KINDS if not given.only or kind.name in given.only]
    for kind in [kind for kind in chosen if not kind.possible()]:
        print(f"{kind.name}: cannot be played here (it mounts a small disk, which needs root)")
        chosen.remove(kind)
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # so that it ends what it has started
    prepare_server()
    root = Path(tempfile.mkdtemp(prefix="mft-faults-"))
    bench, results = Bench(root), []

    def one(number: int) -> Result:
        return play(bench, given.seed, number, kind_of(given.seed, number, chosen), given.keep)

    try:
        with ThreadPoolExecutor(given.side_by_side) as pool:
            playing = [pool.submit(one, n) for n in range(given.first, given.first + given.faults)]
            for future in as_completed(playing):
                results.append(result := future.result())
                if given.record:
                    record(result, given.record)
                print(f"{result.number:>4} {result.seconds:>6.1f} s  {result.outcome:<10} {result.kind}: "
                      f"{result.struck} ({result.setup})", flush=True)  # fmt: skip
    except KeyboardInterrupt:
        pool.shutdown(cancel_futures=True)
    finally:
        end_all(root)
    print(f"\n{table(results)}")
    if all(result.good for result in results) and not given.keep:
        shutil.rmtree(root, ignore_errors=True)
    else:
        print(f"\nfolders of the failures: {root}/cases")
    return 0 if all(result.good for result in results) else 1


if __name__ == "__main__":
    sys.exit(main())
