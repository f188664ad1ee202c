"""Rank runs by their best validation, say which differences are real, and write a report with pictures.

The runs are those in folders (multirun/<name>, one sweep, outputs/<name>) or of MLflow experiments. Runs that
differ by their seed alone are one setting; settings are compared in pairs of equal seeds, and a winner is
named only where it is told apart from every other one.

Of metrics called accuracy, f1, pass@1, tokens_per_second and the like the highest value is the best; --higher
says so for a name that does not tell.

examples:
  mft compare multirun/demo
  mft compare multirun/demo --metric worst,docstring --group-by loss,optimizer.lr --csv table.csv
  mft compare multirun/demo --baseline loss=token_mean --latex table.tex
  mft compare multirun/demo --with results.json --metric hellaswag/acc
  mft compare my_experiment --uri sqlite:///mlflow.db
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from mft.commands.arguments import FILE, TEXT, Parser, Value, one_of
from mft.console.screen import console, say
from mft.console.tables import table
from mft.errors import UserError


def parser() -> Parser:
    """Returns the command line of `mft compare`."""
    words = "DIR [DIR …] | EXPERIMENT [--metric NAME,NAME] [--group-by KEY,KEY] …"
    line = Parser("compare", words, __doc__)
    what = "mean, worst, a task, or any metric that was logged; several with commas, the first one ranks"
    line.option("--metric", TEXT, what, "mean")
    line.switch("--higher", help="the highest value of the metric is the best (short for --better higher)")
    line.option("--better", one_of("WHICH", "lower", "higher"), "which value of the metric is better")
    line.option("--group-by", TEXT, "keys that make a setting, KEY,KEY; else all that differ", "")
    what = "setting that the others are compared with, KEY=VALUE,…, or single: the runs on one task each"
    line.option("--baseline", TEXT, f"{what}; else the best one", "")
    what = "results of lm-eval or evalplus as metrics of the run whose model they are of; repeatable"
    line.option("--with", Value("a file of results", "[RUN=]FILE"), what, action="append", dest="results")
    line.option("--csv", FILE, "write the table to this file, too, with all that is known of a setting")
    line.option("--markdown", FILE, "write the table to this file, too (*.md)")
    line.option("--latex", FILE, "write the table to this file, too (*.tex; needs \\usepackage{booktabs})")
    what = "where the report goes, and compare.json beside it; a file, or a folder; else the (first) folder"
    line.option("--out", FILE, what)
    line.option("--uri", TEXT, "address of an MLflow store; else ./mlflow.db; repeatable", action="append")
    return line


def command(arguments: Sequence[str]) -> None:
    """Prints the table and what may be said of it, and writes the report and the other files."""
    parsed = parser().parse(arguments or ["--help"])
    places = parsed.words
    if not places:
        raise UserError("mft compare needs a folder or the name of an MLflow experiment.")
    if parsed.higher and parsed.better == "lower":
        raise UserError("--higher and --better lower contradict each other; leave one of them out.")
    from mft.comparison import compare_json, ranked_table, report
    from mft.comparison.compare import compare
    from mft.comparison.notes import notes
    from mft.comparison.verdicts import covered, sentence
    from mft.runs.other_tools import add_results
    from mft.runs.places import at
    from mft.training.panels import cannot_draw

    metrics, by = ([name for name in text.split(",") if name] for text in (parsed.metric, parsed.group_by))
    runs, twice = at(places, parsed.uri or [], metrics)
    if not runs:
        raise UserError(f"There is no run in {', '.join(places)}.")
    for note in [*twice, *(add_results(runs, results) for results in parsed.results or ())]:
        say(note)
    title, better = ", ".join(places), "higher" if parsed.higher else parsed.better or ""
    comparison = compare(runs, title, metrics or ["mean"], by, better, parsed.baseline)
    screen = console()
    head, rows, widths, left_out, _ = ranked_table.fitted_table(comparison, screen.width)
    counted = f"{_counted(len(runs), 'run')}, {_counted(len(comparison.settings), 'setting')}"
    numbers = {"rank", "n", "p", "seconds"}
    screen.print(table(counted, head, rows, numbers=numbers, widths=widths))
    if left_out:
        say(f"no room here, but in the report: {', '.join(left_out)}")
    said = [sentence(comparison), covered(comparison.differences, comparison.paired_over)]
    for line in filter(None, [*said, *notes(comparison)]):
        say(line)
    unfinished = [f"{run.name} ({run.state})" for run in runs if run.state != "finished"]
    if unfinished:  # they may still improve, or have seen less data than the others
        say(f"unfinished runs, ranked by their results so far: {', '.join(unfinished)}")
    if parsed.csv:
        with _writing("--csv", parsed.csv):
            ranked_table.write_csv(comparison, parsed.csv)
        say(f"table: {parsed.csv}")
    for kind in ranked_table.PAPER:
        if path := getattr(parsed, kind):
            with _writing(f"--{kind}", path):
                ranked_table.write_paper_table(comparison, path, kind)
            say(f"table: {path}")
    first = Path(places[0])
    out = parsed.out or (first if first.is_dir() else Path("."))
    out = out / "report.html" if out.is_dir() else out
    with _writing("--out" if parsed.out else "the report (--out FILE puts it elsewhere)", out):
        page = report.write(comparison, out)
        values = compare_json.write(comparison, out.with_name(compare_json.FILE))
    say(f"report: {page}")
    if why_not := cannot_draw():
        say(why_not)
    say(f"for other programs: {values}")


@contextmanager
def _writing(what: str, path: Path) -> Iterator[None]:
    """Says in a sentence where a file cannot be written."""
    try:
        yield
    except OSError as error:
        raise UserError(f"{what}: {path} cannot be written: {error.strerror or error}.") from error


def _counted(number: int, what: str) -> str:
    return f"{number:,} {what}{'' if number == 1 else 's'}"
