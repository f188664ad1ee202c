"""What a person sees in a browser: MLflow's page with the runs of a real sweep, and the sweep's report."""

from __future__ import annotations

from pathlib import Path

import pytest

from mft.tracking.view import CHARTS
from mft.tracking.store import client_for
from tests.browser import CHROMIUM, MISSING, page
from tests.tracking.server import free_port, kill_server, start_server

pytestmark = [pytest.mark.slow, pytest.mark.skipif(CHROMIUM is None, reason=MISSING)]

RUNS = [f"loss={loss} train.seed={seed}" for loss in ("task_token_mean", "coba") for seed in (1, 2)]

LINES = """Object.fromEntries([...document.querySelectorAll('[data-testid="experiment-view-compare-runs-card"]')].map(
  card => [card.querySelector('[title]')?.title, [...card.querySelectorAll('path.js-line')].filter(
    line => line.getAttribute('d')?.includes('L')).length / 2]))"""
"""Of every chart of MLflow's page: its metric, and the number of runs with a line in it (as logged, and
smoothed)."""


def test_mlflow_shows_every_run_in_the_table_and_in_the_charts(swept: Path, tmp_path: Path) -> None:
    port = free_port()
    server = start_server(swept, port)
    try:
        (experiment,) = [
            e for e in client_for(f"sqlite:///{swept}/mlflow.db").search_experiments() if e.name == "small"
        ]
        with page(tmp_path / "profile") as browser:
            address = f"http://127.0.0.1:{port}/#/experiments/{experiment.experiment_id}/runs?{CHARTS}"
            browser.open(address, height=12000)  # charts are drawn where they can be seen
            said = [*RUNS, "4 matching runs"]
            browser.until(f"{said}.every(text => document.body.innerText.includes(text))", seconds=300)
            wanted = ["valid/loss", "valid/loss/docs", "valid/loss/code", "train/loss/docs", "lr"]
            every = " && ".join(f"(({LINES})['{name}'] == {len(RUNS)})" for name in wanted)
            browser.until(every, seconds=300)
            lines = browser.js(LINES)
            assert lines["train/weight/docs"] == 2, "the runs of coba"
    finally:
        kill_server(server)


def test_the_report_opens_without_network_and_without_complaint(swept: Path, tmp_path: Path) -> None:
    (report,) = swept.glob("multirun/small/*/report.html")
    with page(tmp_path / "profile") as browser:
        browser.open(report.as_uri(), height=3000, offline=True)
        assert browser.errors == []
        assert {request.split(":")[0] for request in browser.requests} == {"file", "data"}
        sizes = browser.js("[...document.images].map(image => image.naturalWidth)")
        assert len(sizes) >= 4 and min(sizes) > 300, "a picture is missing"
        assert browser.js("document.querySelectorAll('table')[0].rows.length") == 3, (
            "two settings and the head"
        )
        assert "within seed noise" in browser.js("document.body.innerText")
        browser.picture(tmp_path / "report.png")
