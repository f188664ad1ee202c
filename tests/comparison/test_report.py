"""The page of a comparison: complete without its script, without network, and text of runs stays text."""

from __future__ import annotations

import base64
import hashlib
import re
import sys
import time
from collections import Counter
from html.parser import HTMLParser
from pathlib import Path

import pytest

from mft.comparison import report
from mft.comparison.compare import Comparison, compare
from mft.comparison.notes import notes
from mft.comparison.page.svg import INK, Canvas, short
from mft.comparison.page.tested import losses_beside
from mft.runs.results import Run
from tests.browser import CHROMIUM, MISSING, page
from tests.comparison.made_grids import TASKS, grid, made_run, search

HOSTILE = (
    "<script>window.ran=1</script>",
    "\"><img src=x onerror='window.ran=1'>",
    "</title></svg></style><svg onload=window.ran=1>",
    "$x_{1}$ & {{ 7*7 }} \\frac{",
    "a\nb\tc",
    "\u202eevil\u2066\x1b[31m\x00",
    "'; --x=javascript:window.ran=1",
    "任务 ĝ̵ 🙂",
)


SURROGATE = "\ud800"
"""Half a pair, as in the names of files that are no UTF-8: neither UTF-8 nor XML has it."""


class Parsed(HTMLParser):
    """The elements of a page: (tag, attributes), its text by the element that holds it, and its headings."""

    def __init__(self, path: Path):
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.texts: list[tuple[str, str]] = []
        self.inside = ""
        self.feed(path.read_text(encoding="utf-8"))
        self.headings = [text for tag, text in self.texts if tag == "h2"]
        self.text = "\n".join(text for tag, text in self.texts if tag not in ("script", "style"))

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        self.inside = tag

    def handle_endtag(self, tag: str) -> None:
        self.inside = ""

    def handle_data(self, data: str) -> None:
        self.texts.append((self.inside, data))

    def all(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.elements if name == tag]


def written(comparison: Comparison, folder: Path) -> Parsed:
    return Parsed(report.write(comparison, folder / "report.html"))


@pytest.fixture(scope="module")
def studied(tmp_path_factory: pytest.TempPathFactory) -> tuple[Comparison, Path]:
    """A comparison of two keys and three seeds, and its page."""
    comparison = compare(grid(), "a study")
    return comparison, report.write(comparison, tmp_path_factory.mktemp("study") / "report.html")


@pytest.fixture(scope="module")
def hostile(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The page of runs in which everything that a person or a data set can name is hostile."""
    comparison = compare(hostile_runs(), HOSTILE[0])
    return report.write(comparison, tmp_path_factory.mktemp("hostile") / "report.html")


def hostile_runs() -> list[Run]:
    runs = []
    for place, value in enumerate(HOSTILE):
        for seed in (1, 2):
            losses = {
                f"{task}{SURROGATE}": 1 + 0.1 * i + 0.05 * place + 0.001 * seed
                for i, task in enumerate(HOSTILE)
            }
            facts = dict.fromkeys(("host", value), value) | {"data": {value: {value: 3}}}
            named = {"name": value, "where": f"{value}/{seed}", "command": f"mft train '{value}'"}
            values = {"loss": value, value: HOSTILE[place - 1]}
            runs.append(made_run(values, losses, seed, facts=facts, state=value, **named))
    return runs


def test_the_page_answers_with_everything_a_comparison_knows(studied: tuple[Comparison, Path]) -> None:
    comparison, page = studied[0], Parsed(studied[1])
    assert page.headings == [
        "Settings",
        "Differences by task",
        "Differences and seeds",
        "Learning curves",
        "What each key does",
        "Two keys together",
        "Trade-offs",
        "Test beside validation",
        "Weights of the tasks over time",
        "Time and memory",
        "What the runs stand on",
        "Samples of the tasks",
        "What differs between the runs",
        "To reproduce a run",
    ]
    for text in (
        "is lower than all others",
        "95 % interval",
        "p after Holm",
        "never used to choose",
        "regret %",
    ):
        assert text in page.text, text
    for run in comparison.runs:
        assert run.command in page.text
    shown = {text for tag, text in page.texts if tag in ("text", "td", "th", "dd")}
    assert {*TASKS, "lowest", "higher", "before training", "0123456789ab", "1 M ●"} <= shown


def test_what_is_not_the_same_in_all_runs_is_listed(tmp_path: Path) -> None:
    runs = grid(rates=("0.001",), seeds=(1,))
    runs[0].facts["host"] = "elsewhere"
    page = written(compare(runs, "a study"), tmp_path)
    assert "Not the same in all runs" in page.headings
    assert "elsewhere " in page.text and page.text.count("(1 of 2 runs)") >= 2


def test_single_task_runs_and_the_base_model_have_rows_of_their_own(tmp_path: Path) -> None:
    runs = grid(rates=("0.001",))
    runs += [made_run({"loss": "mean"}, {task: 1.1}, seed) for task in TASKS for seed in (1, 2, 3)]
    page = written(compare(runs, "mixes"), tmp_path)
    assert {"single-task runs", "before training"} <= {text for tag, text in page.texts if tag == "th"}
    assert "baseline: single-task runs" in page.text
    assert all(run.command in page.text for run in runs)
    # beside one run on three tasks stand three runs on one
    assert re.search(r"from (5 min|30\d s|29\d s)", page.text)


def test_no_picture_says_nothing(tmp_path: Path) -> None:
    one_value = [made_run({}, {"docs": 1.0}, steps=0)]
    page = written(compare(one_value, "one run"), tmp_path)
    assert page.all("svg") == []
    assert "One setting only" in page.text


def test_keys_that_cannot_be_told_apart_have_no_picture_and_are_named(tmp_path: Path) -> None:
    lines = (("mean", "-", 0.3), ("coba", "1", 0.0), ("coba", "2", 0.1))
    runs = [
        made_run({"loss": x, "loss.tau": tau}, {"docs": 1 + d + s / 100}, s)
        for x, tau, d in lines
        for s in (1, 2)
    ]
    page = written(compare(runs, "a study"), tmp_path)
    assert not any("effect of" in (attributes.get("aria-label") or "") for attributes in page.all("svg"))
    assert "Not told from other keys" in page.text


def test_test_and_validation_losses_are_of_the_same_runs_or_a_note_says_so() -> None:
    """Of three seeds one is tested, and that one, which happens to be the worst, at another step."""
    runs = [made_run({"loss": "mean"}, {"docs": loss}, seed, test={}) for seed, loss in ((1, 1.0), (2, 1.2))]
    runs.append(made_run({"loss": "mean"}, {"docs": 2.0}, 3, test={"docs": 2.1}))
    comparison = compare(runs, "a study")
    assert losses_beside(comparison.settings[0], ["docs"]) == pytest.approx((2.0, 2.1), abs=0.01)
    assert not any("another step" in note for note in notes(comparison))
    runs[2].test_step = 8
    assert any("Test losses of 1 run are of another step" in n for n in notes(compare(runs, "a study")))


def test_a_run_that_did_not_finish_is_named_and_costs_nothing(tmp_path: Path) -> None:
    runs = grid(rates=("0.001",))
    runs += [made_run({"loss": "mean"}, {task: 1.1}, seed) for task in TASKS for seed in (1, 2, 3)]
    runs[0].state, runs[0].seconds, runs[-1].state = "stopped", 1.0, "killed"
    comparison = compare(runs, "mixes")
    page = written(comparison, tmp_path)
    assert "ranked by what they have: mean · 0.001 · s1 (stopped), mean · s3 (killed)" in page.text
    assert "6 in 2 settings, and 9 of the baseline" in page.text
    assert all((setting.cost("seconds") or 0) > 80 for setting in comparison.settings)


def test_a_search_has_its_pictures_and_no_grid_of_single_cells(tmp_path: Path) -> None:
    page = written(compare(search(30), "a search"), tmp_path)
    labels = [attributes.get("aria-label") or "" for attributes in page.all("svg")]
    assert any("parallel coordinates" in label for label in labels)
    assert any("over optimizer.lr and optimizer.weight_decay" in label for label in labels)
    assert "Two keys together" not in page.headings


def test_a_thousand_settings_stay_one_page_of_some_megabytes(tmp_path: Path) -> None:
    comparison = compare(search(1200), "a large search")
    begin = time.process_time()
    page = written(comparison, tmp_path)
    assert time.process_time() - begin < 30  # 4 s on one idle core
    assert (tmp_path / "report.html").stat().st_size < 3_000_000
    assert "of 1,200 settings" in page.text and "further commands" not in page.text


def test_ids_are_unique_and_nothing_refers_to_nowhere(studied: tuple[Comparison, Path]) -> None:
    page = Parsed(studied[1])
    ids = Counter(attributes["id"] for _, attributes in page.elements if "id" in attributes)
    assert ids and max(ids.values()) == 1
    text = studied[1].read_text(encoding="utf-8")
    assert set(re.findall(r'(?:href="|url\()#(\w+)', text)) <= set(ids)
    assert INK not in text and "currentColor" in text


def test_the_policy_allows_the_page_s_own_style_and_script_alone(studied: tuple[Comparison, Path]) -> None:
    page = Parsed(studied[1])
    (policy,) = [a["content"] or "" for a in page.all("meta") if a.get("http-equiv")]
    assert policy.startswith("default-src 'none'") and "unsafe" not in policy
    for tag, kind in (("script", "script-src"), ("style", "style-src")):
        text = "".join(text for name, text in page.texts if name == tag)
        allowed = base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
        assert f"{kind} 'sha256-{allowed}'" in policy
    assert not [a for _, a in page.elements if "style" in a]


def test_hostile_names_stay_text_everywhere(hostile: Path) -> None:
    page = Parsed(hostile)
    assert len(page.all("script")) == len(page.all("style")) == len(page.all("h1")) == 1
    assert page.all("img") == [] and page.all("iframe") == []
    handlers = [name for _, attributes in page.elements for name in attributes if name.startswith("on")]
    assert handlers == []
    links = [a[name] or "" for _, a in page.elements for name in ("href", "src") if name in a]
    assert all(link.startswith(("#", "data:,")) for link in links)
    everything = page.text + "".join(value or "" for _, a in page.elements for value in a.values())
    assert not re.search("[\x00-\x08\x0b-\x1f\u202a-\u202e\u2066-\u2069]", everything)
    assert "{{ 7*7 }}" in page.text and "\\u202eevil" in page.text
    for tag in ("td", "th", "dd", "text", "h1"):  # tables, facts and pictures show it as it is written
        assert any("<script>" in text for name, text in page.texts if name == tag), tag


def test_a_picture_takes_its_text_as_it_is() -> None:
    picture = str(
        Canvas().picture(
            HOSTILE[1], lambda axis: axis.set_title(short(HOSTILE[0] + HOSTILE[5] + SURROGATE, 99))
        )
    )
    assert "<script>" not in picture and "&lt;script&gt;" in picture and "\\x1b" in picture
    assert 'role="img"' in picture and "<img" not in picture


ORDER = "[...document.querySelector('table.sorts').tBodies].at(-1).rows"
COLUMN = "[...document.querySelector('table.sorts').tHead.rows[1].cells]"


@pytest.mark.slow
@pytest.mark.skipif(CHROMIUM is None, reason=MISSING)
def test_a_browser_shows_the_page_on_any_screen_and_runs_nothing_of_the_runs(
    swept: Path, hostile: Path, studied: tuple[Comparison, Path], tmp_path: Path
) -> None:
    (of_sweep,) = swept.glob("multirun/small/*/report.html")
    with page(tmp_path / "profile") as browser:
        for file in (hostile, of_sweep, studied[1]):
            for width in (1400, 390):
                browser.open(file.as_uri(), width=width, height=900, offline=True)
                assert browser.errors == []
                assert {request.split(":")[0] for request in browser.requests} <= {"file", "data"}
                assert browser.js("window.ran === undefined")
                assert browser.js("document.documentElement.scrollWidth <= window.innerWidth"), (file, width)
                assert browser.js("[...document.querySelectorAll('svg')].every(s => s.clientWidth > 5)")
        names = f"[...{ORDER}].map(row => row.cells[0].textContent)"
        ranked = browser.js(names)
        button = f"{COLUMN}.find(cell => cell.textContent == 'mean ± spread').querySelector('button')"
        browser.js(f"{button}.click()")
        assert browser.js(names) == ranked
        browser.js(f"{button}.focus()")
        browser.send("Input.dispatchKeyEvent", type="keyDown", key="Enter", code="Enter", text="\r")
        assert browser.js(names) == ranked[::-1]
        assert browser.js(f"{button}.parentElement.getAttribute('aria-sort')") == "descending"
        dark = [{"name": "prefers-color-scheme", "value": "dark"}]
        browser.send("Emulation.setEmulatedMedia", features=dark)
        paper = browser.js("getComputedStyle(document.body).backgroundColor")
        assert max(map(int, re.findall(r"\d+", paper))) < 60
        assert browser.errors == []


def test_without_matplotlib_the_page_says_so_and_keeps_its_tables(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("matplotlib", "matplotlib.figure"):
        monkeypatch.setitem(sys.modules, name, None)  # as if it were not installed
    parsed = Parsed(report.write(compare(grid(), "a study"), tmp_path / "page.html"))
    assert "matplotlib cannot be imported" in parsed.text and "Settings" in parsed.headings
    assert not [tag for tag, _ in parsed.elements if tag == "svg"]
