"""What a run is resumed from: the newest checkpoint that is sound, the step that was asked for, or nothing at
all."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from mft import run_folder
from mft.commands import runs, show
from mft.commands.trained_model import final_folder
from mft.config.identity import Identity, identity_of
from mft.errors import UserError
from mft.files.checksums import COMPLETE, MODEL, PROSE, WITHOUT_SUMS, require_sound
from mft.launch import resume_choice
from mft.model.merge import merge
from mft.training.checkpoint import complete_steps
from mft.training.resume import lost_rows, newest_sound
from mft.training.state import State
from tests.test_run import same, weights
from tests.tiny_runs import SAVING, logged, train

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory, cache_dir: Path) -> Path:
    """A finished run with checkpoints of steps 2, 4 and 6."""
    return train(tmp_path_factory.mktemp("finished"), cache_dir, *SAVING)[1]


@pytest.fixture
def run(finished: Path, tmp_path: Path) -> Path:
    """A copy of it, as if it had been killed before it ended."""
    shutil.copytree(finished.parent / "tasks", tmp_path / "tasks", copy_function=shutil.copy2)
    folder = shutil.copytree(finished, tmp_path / "run")
    shutil.rmtree(folder / "final")
    (folder / "summary.json").unlink()
    return folder


def flip(path: Path) -> None:
    """Turns one bit in the middle of a file."""
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 4
    path.write_bytes(content)


def halve(path: Path) -> None:
    os.truncate(path, path.stat().st_size // 2)


def writing(text: str) -> Callable[[Path], object]:
    return lambda path: path.write_text(text)


def files(folder: Path) -> list[str]:
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())


@pytest.mark.parametrize("damage", [flip, halve, Path.unlink, writing("")])
def test_a_checkpoint_with_any_file_damaged_is_passed_over_by_its_name(run: Path, damage: Callable) -> None:
    step = run / "checkpoints" / "step-6"
    for name in files(step):
        if name in PROSE:  # a person's to edit or to remove
            continue
        kept = (step / name).read_bytes()
        damage(step / name)
        found, passed = newest_sound(run)
        assert found == run / "checkpoints" / "step-4", name
        if (
            damage is not Path.unlink or name != COMPLETE
        ):  # without a marker it is one that was never finished
            assert name in passed["step-6"], passed
        assert damage is flip or complete_steps(run / "checkpoints") == [2, 4], name
        (step / name).write_bytes(kept)
    assert newest_sound(run) == (step, {})


OLD = {
    "state/loop.json": [
        writing("[]"),
        writing("{}"),
        writing("null"),
        writing('{"step": 6}'),
        halve,
        Path.unlink,
    ],
    "state/engine.json": [writing("[]"), writing("{}"), writing('{"shards": null, "world": 1}'), Path.unlink],
    "state/loss.pt": [halve, writing(""), Path.unlink],
    "state/rng-0.pt": [halve, Path.unlink],
    "state/shard-0.safetensors": [halve, writing(""), Path.unlink],
    "adapter_model.safetensors": [halve],
    "COMPLETE": [writing(""), writing("[]"), writing('{"files": {}}'), writing("null")],
}


@pytest.mark.parametrize("name", OLD)
def test_a_checkpoint_without_checksums_is_taken_unless_it_cannot_be_whole(run: Path, name: str) -> None:
    step = run / "checkpoints" / "step-6"
    (step / COMPLETE).write_text(WITHOUT_SUMS)
    assert newest_sound(run) == (step, {})
    kept = (step / name).read_bytes()
    for damage in OLD[name]:
        damage(step / name)
        found, passed = newest_sound(run)
        assert found == run / "checkpoints" / "step-4" and name.rpartition("/")[2] in passed["step-6"], passed
        (step / name).write_bytes(kept)
    values = json.loads((step / "state" / "loop.json").read_text())
    for wrong in (
        {"step": None},
        {"step": "6"},
        {"step": 4},
        {"rows_consumed": 1.5},
        {"best": []},
        {"best": {"first": []}},
        {"skipped": True},
    ):
        (step / "state" / "loop.json").write_text(json.dumps(values | wrong))
        assert "loop.json" in newest_sound(run)[1]["step-6"], wrong


def test_a_run_goes_on_from_the_newest_sound_checkpoint_and_says_what_it_passed_over(
    finished: Path, run: Path, cache_dir: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    flip(run / "checkpoints" / "step-6" / "state" / "shard-0.safetensors")
    halve(run / "checkpoints" / "step-4" / "state" / "rng-0.pt")
    summary, _ = train(run.parent, cache_dir, *SAVING, "train.keep=2")
    said = " ".join(capsys.readouterr().out.split())
    assert "step-6 is damaged and passed over: state/shard-0.safetensors has the checksum" in said
    assert "step-4 is damaged and passed over: state/rng-0.pt has" in said and "resuming from step-2" in said
    assert summary["status"] == "finished" and logged(run) == logged(finished)
    assert same(weights(run / "final"), weights(finished / "final"))
    # the damaged ones did not count as two of the two that are kept
    assert (
        complete_steps(run / "checkpoints")
        == [4, 6]
        == [int(p.name[5:]) for p in sorted(run.glob("*/step-*"))]
    )
    assert (run / "checkpoints" / "damaged-step-6").is_dir()


def test_a_run_without_a_sound_checkpoint_says_so_and_leaves_them(run: Path, cache_dir: Path) -> None:
    for step in (2, 4, 6):
        writing("")(run / "checkpoints" / f"step-{step}" / "state" / "loop.json")
    for _ in range(2):
        with pytest.raises(
            UserError, match=r"No checkpoint .*step-6: state/loop\.json .*step-2: .*another output_dir"
        ):
            train(run.parent, cache_dir, *SAVING)
    with pytest.raises(UserError, match="No checkpoint"):
        final_folder(str(run))


def test_a_checkpoint_written_without_checksums_is_resumed_to_the_bit(
    finished: Path, run: Path, cache_dir: Path
) -> None:
    shutil.rmtree(run / "checkpoints" / "step-6")
    step = run / "checkpoints" / "step-4"
    (step / COMPLETE).write_text(WITHOUT_SUMS)
    values = json.loads((step / "state" / "loop.json").read_text())
    for new in ("learned", "meter", "seconds", "stalled_of"):
        del values[new]
    (step / "state" / "loop.json").write_text(json.dumps(values))
    train(run.parent, cache_dir, *SAVING)
    assert same(weights(run / "final"), weights(finished / "final")) and logged(run) == logged(finished)


def test_the_step_that_is_asked_for_is_resumed_also_of_a_finished_run(
    finished: Path, run: Path, cache_dir: Path, tmp_path: Path
) -> None:
    shutil.copytree(finished / "final", run / "final")
    shutil.copy(finished / "summary.json", run)
    asked = f"train.resume={run}/checkpoints/step-2"
    for left in (
        ["newer-step-4", "newer-step-6"],
        ["newer-step-4", "newer-step-4-2", "newer-step-6", "newer-step-6-2"],
    ):
        summary, folder = train(tmp_path, cache_dir, *SAVING, asked, out="elsewhere")
        assert folder == run and summary["status"] == "finished" and not (tmp_path / "elsewhere").exists()
        assert logged(run) == logged(finished) and same(weights(run / "final"), weights(finished / "final"))
        assert sorted(p.name for p in (run / "checkpoints").glob("newer-*")) == left
        assert complete_steps(run / "checkpoints") == [2, 4, 6]

    with pytest.raises(UserError, match=r"step-3 does not exist .* Allowed: step-2, step-4, step-6"):
        train(tmp_path, cache_dir, *SAVING, f"train.resume={run}/checkpoints/step-3")
    with pytest.raises(UserError, match=r"another config: .* there, .*peft\.path=.*step-2.*model\.path="):
        train(tmp_path, cache_dir, *SAVING, asked, "optimizer.lr=3e-3")
    with pytest.raises(UserError, match=rf"final is not a run folder.*did you mean {run}\?"):
        train(tmp_path, cache_dir, *SAVING, f"train.resume={run}/final")
    halve(run / "checkpoints" / "step-2" / "state" / "loss.pt")
    with pytest.raises(UserError, match=r"step-2 is damaged: state/loss\.pt has .* expected"):
        train(tmp_path, cache_dir, *SAVING, asked)
    assert complete_steps(run / "checkpoints") == [4, 6], "nothing was set aside"


def test_a_damaged_model_is_refused_wherever_it_is_used(finished: Path, run: Path, cache_dir: Path) -> None:
    final = shutil.copytree(finished / "final", run / "final")
    for name in sorted(set(files(final)) - {"README.md"}):
        kept = (final / name).read_bytes()
        flip(final / name)
        with pytest.raises(UserError, match=name.replace(".", r"\.")):
            require_sound(final)
        (final / name).write_bytes(kept)
    (final / "README.md").write_text("what this is for")
    require_sound(final)
    halve(final / "tokenizer.json")
    with pytest.raises(UserError, match=r"final is damaged: tokenizer\.json has [\d,]+ bytes, expected"):
        train(run.parent, cache_dir, *SAVING, f"peft.path={final}", out="further")
    with pytest.raises(UserError, match=r"tokenizer\.json has"):
        merge(final, run / "merged")
    with pytest.raises(
        UserError, match=rf"{run}/checkpoints/step-6 is sound; train\.resume=.*step-6 writes final/"
    ):
        final_folder(str(run))
    (final / MODEL).unlink()
    require_sound(final)
    shutil.rmtree(final)
    flip(run / "checkpoints" / "step-6" / "adapter_model.safetensors")
    assert final_folder(str(run)) == run / "checkpoints" / "step-4"
    with pytest.raises(UserError, match=r"step-6 is damaged: adapter_model"):
        require_sound(run / "checkpoints" / "step-6")


@pytest.mark.parametrize("umask", [0o022, 0o027, 0o077])
def test_what_is_written_has_the_mode_of_any_new_file(
    finished: Path, run: Path, cache_dir: Path, tmp_path: Path, umask: int
) -> None:
    old = os.umask(umask)
    try:
        train(run.parent, cache_dir, *SAVING, f"train.resume={run}/checkpoints/step-4")
        merge(run / "final", tmp_path / "merged")
    finally:
        os.umask(old)
    written = [
        *(run / "final").iterdir(),
        *(run / "checkpoints" / "step-6").rglob("*"),
        *(tmp_path / "merged").iterdir(),
    ]
    assert len(written) > 20
    assert {oct(path.stat().st_mode & 0o777) for path in written if path.is_file()} == {oct(0o666 & ~umask)}


# ── nothing to resume from ──


@pytest.mark.parametrize(
    "left",
    [
        {"config.tmp": "half"},
        {"config.yaml": None},
        {"config.yaml": None, "identity.tmp": ""},
        {"config.yaml": "", "identity.json": "", "log/rank0.log": "x"},
        {"config.yaml": None, "identity.json": "[]", "overrides.json": "null", "plan.json": "7"},
        {"log/output.txt": "x"},
    ],
)
def test_what_a_run_leaves_that_had_not_begun_is_no_obstacle(
    finished: Path, tmp_path: Path, cache_dir: Path, left: dict[str, str | None]
) -> None:
    folder = tmp_path / "run"
    (folder / "log").mkdir(parents=True)
    (folder / ".lock").touch()
    for name, text in left.items():
        (folder / name).write_text((finished / "config.yaml").read_text() if text is None else text)
    identity = Identity("a", "b")
    assert resume_choice.choose(folder, False, "auto", identity) == (folder, False)


@pytest.mark.parametrize(
    ("left", "told"),
    [
        ({"config.yaml": "name: mine\n"}, r"holds no run, but config\.yaml"),
        ({"config.yaml": None, "thesis.tex": "x"}, r"holds no run, but thesis\.tex"),
        ({"notes.tmp": "x"}, r"holds no run, but notes\.tmp"),
        (
            {"config.yaml": None, "metrics.jsonl": "{}", "identity.json": "{}"},
            r"identity\.json is missing or damaged",
        ),
    ],
)
def test_a_folder_with_anything_else_is_refused(
    finished: Path, tmp_path: Path, left: dict[str, str | None], told: str
) -> None:
    for name, text in left.items():
        (tmp_path / name).write_text((finished / "config.yaml").read_text() if text is None else text)
    with pytest.raises(UserError, match=told):
        resume_choice.choose(tmp_path, False, "auto", Identity("a", "b"))


SHAPES = ["", "null", "[]", "7", '"text"', "{}", '{"status"', "[" * 100_000, "\udcff"]
WRONG = {
    "summary.json": '{"status": [], "seconds": "x", "best": null, "last": {"valid/loss/a": "x"}, "error": {}}',
    "overrides.json": '{"overrides": null, "label": 3, "sweep": [], "data": {}}',
    "plan.json": '{"total_steps": "many"}',
    "identity.json": '{"identity": null, "base": 4}',
    "metrics.jsonl": 'null\n[]\n7\n{"step": null}\n{"step": "x"}\n{"valid/loss": 1}\n',
}


QUICK = ["null", "{}", '{"status"', "\udcff"]
"""Another kind of value, one without keys, half a file, no UTF-8."""


@pytest.mark.parametrize("name", WRONG)
@pytest.mark.parametrize(
    "shapes",
    [QUICK, pytest.param([shape for shape in SHAPES if shape not in QUICK], marks=pytest.mark.long)],
    ids=["quick", "others"],
)
def test_our_own_files_of_another_shape_are_as_if_absent(
    finished: Path, tmp_path: Path, name: str, shapes: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    folder = shutil.copytree(
        finished, tmp_path / "runs" / "one", ignore=shutil.ignore_patterns("checkpoints", "final")
    )
    for text in (*shapes, WRONG[name]):
        (folder / name).write_bytes(text.encode(errors="surrogateescape"))
        runs.command([str(tmp_path / "runs")])
        show.command([str(folder)])
        assert run_folder.state(folder) in ("finished", "killed")
        assert (identity_of(folder) is None) == (name == "identity.json")
    assert "one" in capsys.readouterr().out


def test_rows_that_metrics_jsonl_has_lost_are_told_and_the_others_stay(
    run: Path, tmp_path: Path, cache_dir: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    path = run / "metrics.jsonl"
    newest = run / "checkpoints" / "step-6"
    state = State.from_dict(json.loads((newest / "state" / "loop.json").read_text()))
    assert lost_rows(newest, state) == ""
    lines = path.read_text().splitlines(keepends=True)
    damaged = [*lines[:2], lines[2][:-20] + "\n", *lines[3:]]
    for content, said in (
        ([*lines, lines[-1][:9]], ""),  # half a row, as a kill leaves it
        (damaged, "1 of them cannot be read"),
        ([lines[0].replace("1", "2"), *lines[1:]], "has changed since step-6 was written"),
        (lines[:3], "there is none of step 6"),
        ([], "there is none of step 6"),
    ):
        path.write_text("".join(content))
        assert said in lost_rows(newest, state) and bool(said) == bool(lost_rows(newest, state))
    path.unlink()
    assert "there is none of step 6" in lost_rows(newest, state)
    path.write_text("".join(damaged))
    train(tmp_path, cache_dir, *SAVING)
    assert "1 of them cannot be read. The others are kept" in capfd.readouterr().out
    assert [row["step"] for row in logged(run)] == [0, 1, 2, 3, 4, 4, 5, 6, 6, 6]
