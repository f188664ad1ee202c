"""What a person sees of a sweep's report in a browser."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.browser import CHROMIUM, MISSING, page

pytestmark = [pytest.mark.slow, pytest.mark.skipif(CHROMIUM is None, reason=MISSING)]


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
