"""Every native family on a tiny random model: the largest difference of each check, as a table for
docs/models.md.

    python -m benchmarks.families [family ...]

What the columns are: tests.model.families.measure, which the tests hold to their tolerances.
"""

from __future__ import annotations

import logging
import sys
import tempfile
import time
from pathlib import Path


def main() -> None:
    from tests.model.families import FAMILIES, measure

    logging.disable(logging.WARNING)
    exact = ("packed", "padded", "mixed", "loss", "checkpointing", "4 bits", "saved")
    trained = ("full", "lora", "qlora")
    print(
        "| family | "
        + " | ".join((*exact, *trained))
        + " |\n"
        + "|---" * (1 + len(exact) + len(trained))
        + "|"
    )
    start = time.process_time()
    for name in sys.argv[1:] or FAMILIES:
        with tempfile.TemporaryDirectory() as folder:
            found = measure(name, Path(folder))
        cells = [f"{found[check]:.1e}" if found[check] else "0" for check in exact]
        cells += [f"−{found[peft]:.1%}" for peft in trained]
        print(f"| {name} | " + " | ".join(cells) + " |", flush=True)
    print(f"\n{time.process_time() - start:.0f} CPU seconds, float32")


if __name__ == "__main__":
    main()
