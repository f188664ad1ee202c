"""Results of lm-evaluation-harness and EvalPlus as metrics of runs.

The files are modelled on what lm_eval 0.4 writes (evaluator.py, evaluation_tracker.py: metrics as
`name,filter`, standard errors beside them, model_args as text or as an object), what versions before 0.4
wrote (plain names), and what evalplus/evaluate.py writes since 0.2 (a list of solutions for each problem),
since 0.3 (with `pass_at_k`) and wrote before (`nfiles`, `base`, `plus`).
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from mft.errors import UserError
from mft.runs.other_tools import add_results
from mft.runs.results import Run

HARNESS: dict[str, Any] = {
    "results": {
        "hellaswag": {
            "alias": "hellaswag",
            "acc,none": 0.4271,
            "acc_stderr,none": 0.0049,
            "acc_norm,none": 0.5611,
            "acc_norm_stderr,none": "N/A",
            "sample_len": 10042,
        },
        "gsm8k": {
            "alias": "gsm8k",
            "exact_match,strict-match": 0.11,
            "exact_match_stderr,strict-match": 0.0086,
            "exact_match,flexible-extract": 0.13,
        },
        "wikitext": {"word_perplexity,none": 14.2, "bits_per_byte,none": 0.71},
    },
    "versions": {"hellaswag": 1.0},
    "n-shot": {"hellaswag": 0},
    "config": {
        "model": "hf",
        "model_args": "pretrained=base/model,dtype=bfloat16,peft=RUN/final",
        "limit": None,
    },
    "git_hash": "51a7ca9",
    "date": 1735689600.0,
}


def solution(base: str, plus: str) -> dict[str, Any]:
    return {"task_id": "HumanEval/0", "solution": "…", "base_status": base, "plus_status": plus}


@pytest.fixture
def runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[Run]:
    monkeypatch.chdir(tmp_path)
    for name in ("a", "b"):
        (tmp_path / "runs" / name / "final").mkdir(parents=True)
    folders = [Path("runs") / name for name in ("a", "b")]
    return [Run(f"coba · s{n}", {}, [], "finished", where=str(f), folder=f) for n, f in enumerate(folders)]


def written(content: object, name: str = "results.json") -> str:
    text = content if isinstance(content, str) else json.dumps(content)
    Path(name).write_text(text)
    return name


def of(run: str, **more: Any) -> dict[str, Any]:
    return HARNESS | {"config": {"model_args": f"pretrained=base/model,peft={run}"}} | more


def test_lm_eval_says_which_run_it_measured(runs: list[Run]) -> None:
    said = add_results(runs, written(of("runs/b/final")))
    assert runs[0].metrics == {} and runs[1].metrics == {
        "hellaswag/acc": 0.4271,
        "hellaswag/acc_norm": 0.5611,
        "gsm8k/strict-match/exact_match": 0.11,
        "gsm8k/flexible-extract/exact_match": 0.13,
        "wikitext/word_perplexity": 14.2,
        "wikitext/bits_per_byte": 0.71,
    }
    assert said.startswith("results.json: hellaswag/acc, ") and said.endswith(" of runs/b")
    assert runs[1].best("hellaswag/acc", higher=True) == 0.4271


@pytest.mark.parametrize(
    "config",
    [
        {"model_args": {"pretrained": "runs/a/checkpoints/step-4", "dtype": "auto"}},
        {"model_args": "pretrained=./runs/a,dtype=auto"},
    ],
)
def test_the_model_may_be_a_full_one_and_its_arguments_an_object(
    runs: list[Run], config: dict[str, Any]
) -> None:
    add_results(runs, written(HARNESS | {"config": config}))
    assert "hellaswag/acc" in runs[0].metrics and not runs[1].metrics


def test_a_run_in_a_store_may_have_been_measured_on_another_machine(runs: list[Run]) -> None:
    elsewhere = Run("far", {}, [], "finished", where="x/far", place="/far/runs/a 1234")
    add_results([*runs, elsewhere], written(of("/far/runs/a/final")))
    assert elsewhere.metrics["hellaswag/acc"] == 0.4271


def test_versions_before_filters(runs: list[Run]) -> None:
    results = {"piqa": {"acc": 0.7, "acc_stderr": 0.01, "acc_norm": 0.71}}
    add_results(runs, written(of("runs/a", results=results)))
    assert runs[0].metrics == {"piqa/acc": 0.7, "piqa/acc_norm": 0.71}


@pytest.mark.parametrize("name", ["coba · s1", "runs/b", "./runs/b/", "b"])
def test_evalplus_is_told_its_run(runs: list[Run], name: str) -> None:
    passed = {"base": {"pass@1": 0.5}, "plus": {"pass@1": 0.25}}
    file = written(
        {"date": "2025-01-01 10:00", "hash": "…", "eval": {"HumanEval/0": []}, "pass_at_k": passed}
    )
    add_results(runs, f"{name}={file}")
    assert runs[1].metrics == {"humaneval/pass@1": 0.5, "humaneval+/pass@1": 0.25} and not runs[0].metrics


def test_pass_at_k_is_computed_where_evalplus_did_not_write_it(runs: list[Run]) -> None:
    new = {"Mbpp/2": [solution("pass", "pass")], "Mbpp/3": [solution("pass", "fail")]}
    add_results(runs, f"a={written({'eval': new})}")
    assert runs[0].metrics == {"mbpp/pass@1": 1.0, "mbpp+/pass@1": 0.5}
    right, wrong = ["success", [True]], ["failed", [False]]
    old = {"HumanEval/0": {"nfiles": 10, "base": [right] * 2 + [wrong] * 8, "plus": [right] + [wrong] * 9}}
    add_results(runs, f"b={written({'eval': old})}")
    assert runs[1].metrics == pytest.approx(
        {"humaneval/pass@1": 0.2, "humaneval/pass@10": 1, "humaneval+/pass@1": 0.1, "humaneval+/pass@10": 1}
    )
    base_only = {"HumanEval/0": {"nfiles": 1, "base": [right], "plus": []}}
    runs[0].metrics.clear()
    add_results(runs, f"a={written({'eval': base_only})}")
    assert runs[0].metrics == {"humaneval/pass@1": 1.0}


@pytest.mark.parametrize(
    ("content", "spec", "sentence"),
    [
        ("{", "results.json", "cannot be read as JSON"),
        ("[1]", "results.json", r"unknown layout. Expected the results_….json of lm-evaluation-harness"),
        ({"scores": {}}, "results.json", "unknown layout"),
        ({"results": {}}, "a=results.json", "holds no result of any task"),
        ({"eval": {"HumanEval/0": "?"}}, "a=results.json", "holds no result of any task"),
        (of("elsewhere/final"), "results.json", "its model elsewhere/final is not in the folder of a run"),
        ({"eval": {}}, "results.json", "does not say which model it is of; write RUN=results.json"),
        (of("runs/a"), "coba=results.json", "none of the runs is called so; did you mean coba · s"),
        (of("runs/a"), "result.json", "there is no file result.json; did you mean results.json"),
        (of("runs/a"), ".", "is a folder; did you mean results.json"),
    ],
)
def test_a_mistake_gets_a_sentence(runs: list[Run], content: object, spec: str, sentence: str) -> None:
    written(content)
    with pytest.raises(UserError, match=sentence):
        add_results(runs, spec)
    assert not any(run.metrics for run in runs)


def test_no_value_is_replaced_and_no_run_is_guessed(runs: list[Run]) -> None:
    file = written(of("runs/a"))
    add_results(runs, file)
    with pytest.raises(UserError, match="has hellaswag/acc already; leave one"):
        add_results(runs, file)
    runs[1].name = runs[0].name
    with pytest.raises(UserError, match="runs/a, runs/b are called so; name the folder of one"):
        add_results(runs, f"{runs[0].name}={file}")
