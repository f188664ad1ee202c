"""What a person sees of runs in a browser, on the pages of a real MLflow server."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from mft.files.json_file import write_json
from mft.tracking.sender import sync
from mft.tracking.store import client_for
from mft.tracking.view import CHARTS, TABLE
from tests.browser import CHROMIUM, MISSING, Page, page
from tests.tracking.folders import write_run
from tests.tracking.server import free_port, kill_server, start_server

pytestmark = [pytest.mark.slow, pytest.mark.skipif(CHROMIUM is None, reason=MISSING)]

LINES = """Object.fromEntries([...document.querySelectorAll('[data-testid="experiment-view-compare-runs-card"]')].map(
  card => [card.querySelector('[title]')?.title, [...card.querySelectorAll('path.js-line')].filter(
    line => line.getAttribute('d')?.includes('L')).length / 2]))"""
"""Of every chart of MLflow's page: its metric, and the number of runs with a line in it (as logged, and
smoothed)."""

SEARCH = """(() => {
  const box = document.querySelector('[placeholder="Search metric charts"]');
  Object.getOwnPropertyDescriptor(HTMLInputElement.prototype, 'value').set.call(box, %s);
  box.dispatchEvent(new Event('input', {bubbles: true}));
})()"""
"""Leaves the charts whose metric matches a regular expression, as a person does who types it."""

HOSTILE = "<img src=x onerror='window.hacked=1'>|`b`"
"""Name of a task and of a run."""

BEST = {"coba": 8, "fame lr=1e-3": 4, HOSTILE: 6}
"""Run → its last step; the longer, the better (see `losses_at`)."""

MODEL_TRAINING = "workflowType=machine_learning"


class Pages:
    """One browser on one server, for all tests."""

    def __init__(self, browser: Page, server: str, store: str):
        self.browser, self.server, self.client = browser, server, client_for(store)
        browser.open(f"{server}/")  # its assistant takes a third of the window where it was never closed
        kept = {"autoOpenedOnFirstLoad_v1": "mlflow.assistant.fab.", "panelOpen_v1": "mlflow.assistant."}
        for name, prefix in kept.items():
            value = "true" if name.startswith("auto") else "false"
            browser.js(f"localStorage.setItem('{prefix}{name}', '{value}')")

    def experiment(self, name: str) -> str:
        return str(self.client.get_experiment_by_name(name).experiment_id)

    def run(self, name: str) -> str:
        runs = self.client.search_runs([self.experiment("pages")])
        return next(run.info.run_id for run in runs if run.info.run_name == name)

    def open(self, path: str, *texts: str, experiment: str = "pages", height: int = 1400) -> str:
        """Opens a page of an experiment, waits until it shows the texts, and returns all that it shows."""
        self.browser.open("about:blank")  # else a change behind the # loads nothing
        url = f"{self.server}/#/experiments/{self.experiment(experiment)}/{path}"
        self.browser.open(url, width=2600, height=height)
        return self.shown(*texts)

    def shown(self, *texts: str) -> str:
        self.browser.until(
            f"{json.dumps(texts)}.every(text => document.body.innerText.includes(text))", seconds=300
        )
        self.picture()
        return str(self.browser.js("document.body.innerText"))

    def click(self, text: str) -> None:
        """Clicks the innermost elements that begin with a text."""
        self.browser.js(
            "[...document.querySelectorAll('*')].filter(x => !x.children.length && "
            f"x.innerText?.startsWith({json.dumps(text)})).forEach(x => x.click())"
        )

    def picture(self) -> None:
        """Keeps a picture of what a test sees, where PICTURES names a folder."""
        if "PICTURES" in os.environ:
            name = os.environ["PYTEST_CURRENT_TEST"].partition("::")[2].split()[0]
            self.browser.picture(Path(os.environ["PICTURES"], f"{name}.png"))


@pytest.fixture(scope="module")
def pages(swept: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Pages]:
    work, port = tmp_path_factory.mktemp("pages"), free_port()
    uri = f"sqlite:///{shutil.copy(swept / 'mlflow.db', work / 'mlflow.db')}"
    for number, (name, last) in enumerate(BEST.items()):
        run_dir, steps = work / f"run{number}", (2, 4, last) if last > 4 else (2, last)
        tasks = ("docs", HOSTILE)
        write_run(run_dir, uri, tasks, steps, experiment="pages", run_name=name)
        answers = [["what is next?", f"<b>{number}</b>", "", "", "docs"]]
        columns = ["prompt", "after", "before", "expected", "task"]
        write_json(run_dir / "report" / "answers.json", {"columns": columns, "data": answers})
        sync(run_dir)
    server = start_server(work, port)
    try:
        with page(work / "profile") as browser:
            yield Pages(browser, f"http://127.0.0.1:{port}", uri)
    finally:
        kill_server(server)


def test_every_run_of_a_sweep_is_in_the_table_and_in_the_charts(pages: Pages) -> None:
    runs = pages.client.search_runs([pages.experiment("small")])
    names = [run.info.run_name for run in runs]
    assert len(names) == 4
    pages.open(f"runs?{CHARTS}", *names, "4 matching runs", experiment="small", height=4000)
    wanted = ["valid/loss", "valid/loss/docs", "valid/loss/code", "train/loss/docs", "lr"]
    lines = dict.fromkeys(wanted, len(names)) | {"train/weight/docs": 2}  # the runs of coba
    # charts are drawn where they can be seen, in a second each: of all of them these
    pages.browser.js(SEARCH % json.dumps(f"^({'|'.join(lines)})$"))
    pages.browser.until(" && ".join(f"(({LINES})['{name}'] == {lines[name]})" for name in lines), seconds=300)
    pages.picture()


def test_the_charts_are_in_few_sections_in_which_phases_stand_side_by_side(pages: Pages) -> None:
    """The page has a section for each beginning of names up to the last slash."""
    (run, *_) = pages.client.search_runs([pages.experiment("small")])
    names = [name for name in run.data.metrics if not name.startswith("system/")]
    sections = [name.rpartition("/")[0] for name in names]
    assert len(set(sections)) <= 20 and len(names) <= 60
    assert sections.count("memory/peak_gib") == 4 and sections.count("total/seconds") >= 5


def test_the_table_has_short_names_and_the_best_run_first(pages: Pages) -> None:
    columns = ["best/valid/loss", "test/loss", "total/seconds", "loss", "optimizer.lr"]
    text = pages.open(f"runs?{TABLE}", *columns, *BEST, "3 matching runs", "Sort: best/valid/loss")
    places = [text.index(f"\n{name}\n") for name in sorted(BEST, key=BEST.__getitem__, reverse=True)]
    assert places == sorted(places)
    assert text.count("0.625") == 1, "the best one's loss"


def test_the_models_page_compares_the_losses_of_checkpoints(pages: Pages) -> None:
    text = pages.open(f"models?{MODEL_TRAINING}", "step-2", "final", "valid/loss/docs", "test/loss/docs")
    assert text.count("Ready") == 11, "four of two runs, three of one"
    assert "Failed" not in text and "Pending" not in text
    assert text.count("0.75") == 4 + 4, "the validation at step 4, and the test of its weights"


def test_a_run_names_its_data_sets_with_their_counts(pages: Pages) -> None:
    text = pages.open(f"runs?{MODEL_TRAINING}", "docs (abcdef00-", "3 matching runs")
    assert text.count("docs (abcdef00-") == 3
    pages.click("docs (abcdef00-")
    text = pages.shown("Data details for", "train rows", "Path")
    assert "train rows: 40" in text and "valid rows: 4" in text and "/data/docs" in text


def test_the_description_shows_the_run_and_executes_nothing(pages: Pages) -> None:
    said = ["6 of 6 steps", "mean of tasks", "mft train loss=coba optimizer.lr=0.002"]
    text = pages.open(f"runs/{pages.run(HOSTILE)}?{MODEL_TRAINING}", *said)
    assert text.count(HOSTILE) >= 2, "the run's name, and the task in the table of losses"
    assert pages.browser.js("window.hacked === undefined && !document.querySelector('img[src=x]')")
    assert not [error for error in pages.browser.errors if "hacked" in error]


def test_answers_of_runs_stand_side_by_side(pages: Pages) -> None:
    text = pages.open(
        f"runs?compareRunsMode=ARTIFACT&{MODEL_TRAINING}", "what is next?", "<b>0</b>", "<b>2</b>"
    )
    shown = " ".join(text.split())
    assert "Group by: prompt" in shown and "Compare: after" in shown
