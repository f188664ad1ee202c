"""Which cells a command line has, and what is refused before anything is trained."""

from __future__ import annotations

from pathlib import Path

import pytest

from mft import cli
from mft.errors import UserError
from mft.verify.cells import check_all, combined, not_used
from tests.tiny_runs import two_tasks


def test_every_combination_of_values_is_a_cell() -> None:
    given = [
        "debug=fast",
        "peft=full,lora",
        "task=[a,b]",
        "optimizer.lr=choice(0.1,0.2)",
        "train.seed=range(1,3)",
    ]
    cells = combined(given)
    assert len(cells) == 8
    assert cells[0] == (
        ("debug=fast", "peft=full", "task=[a,b]", "optimizer.lr=0.1", "train.seed=1"),
        "peft=full optimizer.lr=0.1 train.seed=1",
    )
    assert combined(["debug=fast"]) == [(("debug=fast",), "(all as given)")]
    for wrong in ("optimizer.lr=interval(0,1)", "model=glob(*)"):
        with pytest.raises(UserError, match="expected values separated by commas"):
            combined([wrong])
    with pytest.raises(UserError, match="cannot be read"):
        combined(["peft=[lora"])


def test_cells_have_ranks_to_verify_and_leave_alone_what_is_the_users(
    tmp_path: Path, cache_dir: Path
) -> None:
    mine = ["debug=fast", "tracking=mlflow", f"output_dir={tmp_path / 'mine'}", "train.max_steps=7"]
    given = [*mine, f"cache_dir={cache_dir}", two_tasks(tmp_path), "dist=single,ddp,fsdp"]
    jobs = [cell.job for cell in check_all([*given, "data=pad"], [], 4)]
    assert [job.world for job in jobs if job] == [1, 2, 2]
    assert all(job and job.cfg.tracking == {} and job.cfg.train.max_steps == 4 for job in jobs)
    given_ranks = check_all([*given, "launch.nproc=1", "loss=sample_mean", "data=pad,concat"], [], 4)
    assert [bool(cell.job) for cell in given_ranks] == [True, False] * 3
    assert (
        "counts whole samples" in given_ranks[1].refusal and given_ranks[1].label == "dist=single data=concat"
    )
    assert {cell.job.world for cell in given_ranks if cell.job} == {1}
    (several,) = check_all([*given[:-1], "launch.nnodes=2", "launch.rdzv_endpoint=a:1"], [], 4)
    assert several.job is None and "one machine" in several.refusal
    assert not (tmp_path / "mine").exists()


def test_settings_that_the_command_decides_are_named() -> None:
    given = ["tracking.mlflow.uri=x", "output_dir=x", "train.max_steps=3", "launch=inline", "launch.nproc=2"]
    said = [sentence.partition(" has no effect: ")[0] for sentence in not_used(given)]
    assert said == given[:4]


def refused(capsys: pytest.CaptureFixture[str], *words: str) -> tuple[int, str]:
    with pytest.raises(SystemExit) as ended:
        cli.main(["verify-resume", *words])
    return ended.value.code, "".join(capsys.readouterr())  # type: ignore[return-value]


def test_what_proves_nothing_is_refused(tmp_path: Path, cache_dir: Path, capsys) -> None:
    given = ["debug=fast", f"cache_dir={cache_dir}", two_tasks(tmp_path)]
    code, said = refused(capsys, *given, "--at", "4", "--steps", "4")
    assert code == 2 and "--at 4 must be below --steps 4" in said
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine.txt").touch()
    code, said = refused(capsys, *given, "--keep", str(tmp_path / "full"))
    assert code == 2 and "is not empty; choose another folder" in said
    code, said = refused(capsys, *given, "loss=famo,coba", "data=concat", "model=nonesuch", "-m")
    assert code == 2 and said.count("refused") >= 5 and "2 refused." in said and "passed" not in said
