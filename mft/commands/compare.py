"""Rank runs by their lowest validation loss, and write a report with pictures.

The runs are those in folders (multirun/<name>, one sweep, outputs/<name>) or of an MLflow experiment. Runs
that differ by their seed alone are one setting; the spread between seeds says how far to trust the ranking.

Of metrics called accuracy, f1, pass@1, tokens_per_second and the like the highest value is the best; --better
decides for names that do not tell.

examples:
  mft compare multirun/demo
  mft compare multirun/demo --metric worst --group-by loss,optimizer.lr --csv table.csv
  mft compare my_experiment --uri sqlite:///mlflow.db
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from mft.commands.arguments import FILE, TEXT, Parser, one_of
from mft.console.screen import say
from mft.errors import UserError


def parser() -> Parser:
    """Returns the command line of `mft compare`."""
    words = "DIR [DIR …] | EXPERIMENT [--metric NAME] [--group-by KEY,KEY] …"
    line = Parser("compare", words, __doc__)
    line.option("--metric", TEXT, "mean, worst, a task, or the name of any metric that was logged", "mean")
    line.option("--better", one_of("WHICH", "lower", "higher"), "which value of the metric is better")
    line.option("--group-by", TEXT, "keys that make a setting, KEY,KEY; else all that differ", "")
    line.option("--csv", FILE, "write the table to this file, too")
    line.option("--out", FILE, "where the report goes; else report.html in the (first) folder")
    line.option("--uri", TEXT, "address of the MLflow store; else ./mlflow.db", "")
    return line


def command(arguments: Sequence[str]) -> None:
    """Prints the table and the verdict, and writes the report."""
    parsed = parser().parse(arguments or ["--help"])
    places, metric = parsed.words, parsed.metric
    if not places:
        raise UserError("mft compare needs a folder or the name of an MLflow experiment.")
    from mft.runs import results
    from mft.runs.comparison import compare
    from mft.runs.report import write

    runs = [run for place in places for run in results.at(place, parsed.uri, metric)]
    first = Path(places[0])
    out = parsed.out or (first if first.is_dir() else Path(".")) / "report.html"
    say(f"report: {write(compare(runs, ', '.join(places), [metric]), out)}")
