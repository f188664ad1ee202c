"""train.save_state=last: older checkpoints hold the weights alone, which everything but a resume reads."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from mft.commands.trained_model import final_folder
from mft.errors import UserError
from mft.files.checksums import COMPLETE, require_sound, seal
from mft.model.merge import merge
from mft.training import weights_only
from mft.training.checkpoint import complete_steps, newest
from mft.training.resume import newest_sound, resumable_steps, trouble
from mft.training.weights_only import is_weights_only, reduce_to_weights
from tests.test_run import same, weights
from tests.tiny_runs import SAVING, logged, stopped_after, train
from tests.training.test_resume import files, flip

pytestmark = pytest.mark.slow

LAST = (*SAVING, "train.save_state=last")
DROPPED = ["state/optimizer-0.safetensors", "state/rng-0.pt"]


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory, cache_dir: Path) -> Path:
    """A finished run with all of the checkpoints of steps 2, 4 and 6."""
    return train(tmp_path_factory.mktemp("whole"), cache_dir, *SAVING)[1]


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory, cache_dir: Path) -> Path:
    """The same run, of which step 6 alone keeps its state."""
    return train(tmp_path_factory.mktemp("last"), cache_dir, *LAST)[1]


def copied(run: Path, tmp_path: Path, *left_out: str) -> Path:
    """Returns a copy of a run, as if it had been killed before it ended."""
    shutil.copytree(run.parent / "tasks", tmp_path / "tasks", copy_function=shutil.copy2)
    left = shutil.ignore_patterns("final", "summary.json", *left_out)
    return Path(shutil.copytree(run, tmp_path / "run", ignore=left))


def step(run: Path, number: int) -> Path:
    return run / "checkpoints" / f"step-{number}"


def test_older_checkpoints_hold_the_weights_alone_and_nothing_else_differs(
    whole: Path, finished: Path, tmp_path: Path, cache_dir: Path
) -> None:
    assert logged(finished) == logged(whole) and same(weights(finished / "final"), weights(whole / "final"))
    assert complete_steps(finished / "checkpoints") == [2, 4, 6] and resumable_steps(finished) == [6]
    assert files(step(finished, 6)) == files(step(whole, 6))
    for number in (2, 4):
        old = step(finished, number)
        assert is_weights_only(old) and not is_weights_only(step(whole, number))
        assert sorted(files(step(whole, number))) == sorted([*files(old), *DROPPED])
        assert trouble(old) == "" and same(weights(old), weights(step(whole, number)))
        require_sound(old)
    merge(step(finished, 4), tmp_path / "merged")
    given = (f"peft.path={step(finished, 4)}", "train.max_steps=1")
    assert train(tmp_path, cache_dir, *given)[0]["status"] == "finished"


def test_a_stopped_run_goes_on_from_its_newest_checkpoint_to_the_bit(
    whole: Path, tmp_path: Path, cache_dir: Path
) -> None:
    with stopped_after(4):
        summary, run = train(tmp_path, cache_dir, *LAST)
    assert summary["status"] == "stopped" and resumable_steps(run) == [4] and is_weights_only(step(run, 2))
    assert train(tmp_path, cache_dir, *LAST)[0]["status"] == "finished"
    assert logged(run) == logged(whole) and same(weights(run / "final"), weights(whole / "final"))
    assert resumable_steps(run) == [6]


def test_resuming_a_weights_only_checkpoint_is_refused_with_the_steps_that_can_be(
    finished: Path, tmp_path: Path, cache_dir: Path
) -> None:
    run = copied(finished, tmp_path)
    told = (
        r"step-2 holds the weights alone \(train\.save_state=last\).* Allowed: step-6\. peft\.path=.*step-2 "
    )
    with pytest.raises(UserError, match=told):
        train(tmp_path, cache_dir, *LAST, f"train.resume={step(run, 2)}")
    with pytest.raises(UserError, match=r"step-3 does not exist .* Allowed: step-6\."):
        train(tmp_path, cache_dir, *LAST, f"train.resume={step(run, 3)}")


def test_without_its_newest_checkpoint_the_run_has_nothing_to_fall_back_to_and_says_so(
    finished: Path, tmp_path: Path, cache_dir: Path
) -> None:
    run = copied(finished, tmp_path)
    flip(step(run, 6) / "state" / "optimizer-0.safetensors")
    problem = r"has the state that a resume needs: step-6: state/optimizer-0\.safetensors has the checksum"
    told = (
        rf"{problem}.*; step-4: holds the weights alone; step-2: .*another output_dir.* peft\.path=.*step-4 "
    )
    with pytest.raises(UserError, match=told):
        train(tmp_path, cache_dir, *LAST)
    found, damaged = newest_sound(run)
    assert found is None and list(damaged) == ["step-6"]
    assert final_folder(str(run)) == step(run, 4), "its weights are as good as ever"
    shutil.rmtree(step(run, 6))
    with pytest.raises(
        UserError, match=r"state that a resume needs: step-4: holds the weights alone; step-2"
    ):
        train(tmp_path, cache_dir, *LAST)
    assert newest(run) is None


def test_a_kill_while_a_checkpoint_is_reduced_leaves_it_complete(
    whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Killed(BaseException):
        pass

    unlink = Path.unlink

    def kill(path: Any, *rest: Any, **options: Any) -> None:
        if isinstance(path, Path) and f"state/{path.name}" not in DROPPED and path != old:
            return unlink(path, *rest, **options)
        raise Killed

    def killed(target: object, name: str) -> None:
        with monkeypatch.context() as patch, pytest.raises(Killed):
            patch.setattr(target, name, kill)
            reduce_to_weights(old)

    old = step(copied(whole, tmp_path), 4)
    everything = files(old)
    killed(weights_only, "seal")
    killed(os, "fsync")  # the new marker is half written
    assert not is_weights_only(old) and trouble(old) == ""
    killed(Path, "unlink")  # the marker is written
    assert is_weights_only(old) and trouble(old) == "" and set(everything) <= set(files(old))
    (old / DROPPED[0]).unlink()
    assert is_weights_only(old) and trouble(old) == ""
    reduce_to_weights(old)
    assert not set(DROPPED) & set(files(old)) and trouble(old) == ""
    content = (old / COMPLETE).read_bytes()
    reduce_to_weights(old)
    assert (old / COMPLETE).read_bytes() == content
    flip(old / "state" / "shard-0.safetensors")
    assert "state/shard-0.safetensors" in trouble(old), "what is left is still proved by its checksums"


def test_a_checkpoint_of_an_earlier_version_keeps_what_is_in_one_file(whole: Path, tmp_path: Path) -> None:
    old = step(copied(whole, tmp_path), 4)
    shard, optimizer = (old / "state" / f"{kind}-0.safetensors" for kind in ("shard", "optimizer"))
    with safe_open(shard, "pt") as first, safe_open(optimizer, "pt") as second:
        entries = [json.loads(file.metadata()["pieces"]) for file in (first, second)]
    joined = [place | piece for place, piece in zip(*entries, strict=True)]
    save_file(load_file(shard) | load_file(optimizer), shard, {"pieces": json.dumps(joined)})
    optimizer.unlink()
    state = json.loads((old / "state" / "engine.json").read_text())
    del state["optimizers"]
    (old / "state" / "engine.json").write_text(json.dumps(state))
    seal(old, COMPLETE)
    before = files(old)
    reduce_to_weights(old)
    assert files(old) == before and not is_weights_only(old) and trouble(old) == ""
