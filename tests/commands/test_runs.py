"""`mft runs`, `mft show` and `mft tracking sync` on a real small sweep."""

from __future__ import annotations

from pathlib import Path

import pytest

from mft import cli, run_folder
from mft.files.json_file import read_json
from mft.tracking.store import client_for


@pytest.fixture
def here(swept: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(swept)
    return swept


def said(capsys: pytest.CaptureFixture[str], *args: str) -> str:
    cli.main(list(args))
    return " ".join(capsys.readouterr().out.split())


def test_a_sweep_is_one_line_and_its_jobs_are_listed_by_its_folder(here: Path, capsys) -> None:
    (sweep,) = here.glob("multirun/small/*")
    text = said(capsys, "runs")
    assert "runs and sweeps: 1" in text and f"multirun/small/{sweep.name}" in text
    assert "4 finished" in text and "sweep of 4 jobs, best: loss=" in text
    bests = [read_json(run / "summary.json")["best"] for run in run_folder.runs_under(sweep)]
    best = min(bests, key=lambda values: values["valid/loss"])
    assert f"{best['valid/loss']:.4f}" in text and f"docs {best['valid/loss/docs']:.3f}" in text
    text = said(capsys, "runs", str(sweep))
    assert "runs and sweeps: 4" in text and text.count("6/6") == 4 and "sweep of" not in text
    for loss in ("task_token_mean", "coba"):
        assert all(f"loss={loss} train.seed={seed}" in text for seed in (1, 2))
    with pytest.raises(SystemExit):
        cli.main(["runs", "multirum"])
    assert "did you mean multirun?" in capsys.readouterr().err


def test_show_says_what_was_changed_how_it_went_and_where_its_files_are(here: Path, capsys) -> None:
    run = next(
        r for r in run_folder.runs_under(here / "multirun") if "coba" in (r / "overrides.json").read_text()
    )
    text = said(capsys, "show", str(run.relative_to(here)))
    assert "finished, 6/6 steps" in text
    for part in (
        "model tiny auto",
        "loss coba task_token_mean",
        "optimizer.lr 0.002 null",
        "train.max_steps 6 null",
    ):
        assert part in text, text
    assert "model.hidden_size" not in text, "what follows from an option is no change"
    assert "data fingerprint" in text and "adapter fingerprint" not in text, "there is no adapter"
    assert (
        f"model {run.relative_to(here)}/final" in text and f"again cd {here} && mft train debug=fast" in text
    )
    losses = read_json(run / "summary.json")
    assert (
        f"docs │ {losses['first']['valid/loss/docs']:.3f} │ {losses['last']['valid/loss/docs']:.3f}" in text
    )
    with pytest.raises(SystemExit):
        cli.main(["show", "multirun"])
    assert "is not a run folder" in capsys.readouterr().err


def test_what_mlflow_has_of_the_sweep(here: Path) -> None:
    client = client_for(f"sqlite:///{here}/mlflow.db")
    experiments = {e.name: e.experiment_id for e in client.search_experiments()}
    jobs = client.search_runs([experiments["small"]])
    (report,) = client.search_runs([experiments["small reports"]])
    assert [file.path for file in client.list_artifacts(report.info.run_id)] == ["report.html"]
    assert not report.data.metrics and not report.data.params
    assert len(jobs) == 4 and {run.info.status for run in jobs} == {"FINISHED"}
    assert {(run.data.params["loss"], run.data.params["train.seed"]) for run in jobs} == {
        (loss, seed) for loss in ("task_token_mean", "coba") for seed in ("1", "2")
    }
    tags = (
        "sweep",
        "job",
        "overrides",
        "git_commit",
        "data_fingerprint",
        "model",
        "loss",
        "peft",
        "dist",
        "host",
    )
    for run in jobs:
        assert not [tag for tag in tags if not run.data.tags.get(tag)], run.data.tags
        assert not any("parent" in tag for tag in run.data.tags), "nested runs leave the page's charts empty"
        assert run.data.tags["sweep"] == report.data.tags["sweep"] and "valid/loss/docs" in run.data.metrics
        folder = Path(run.data.tags["run_folder"]).name
        assert list((here / "tb" / folder).glob("events.out.*")), "tracking.tensorboard.dir"
        steps = [point.step for point in client.get_metric_history(run.info.run_id, "valid/loss/docs")]
        assert sorted(steps) == sorted(set(steps)), "a point is doubled"
        assert any(name.startswith("system/") for name in run.data.metrics), "tracking.mlflow.system_metrics"


def test_sync_says_what_is_wrong(tmp_path: Path, capsys) -> None:
    for args, part in (
        (["sink"], "unknown subcommand"),
        (["sync", str(tmp_path)], "no run tracked by MLflow in"),
    ):
        with pytest.raises(SystemExit):
            cli.main(["tracking", *args])
        assert part in capsys.readouterr().err
