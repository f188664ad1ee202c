"""The command from end to end, in processes of its own: what passes, what is refused, and a defect that it
finds."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from mft import run_folder
from mft.training.trace import read
from tests.sweeping import mft, two_tasks

pytestmark = [pytest.mark.slow, pytest.mark.dist]

FORGETFUL = '''
from dataclasses import dataclass
from mft.loss.lbtw import Lbtw

@dataclass
class Forgetful(Lbtw):
    """A mode that keeps nothing of what it has learned."""

    def state_dict(self):
        return {}

    def load_state_dict(self, state):
        pass
'''


def test_cells_pass_fail_and_are_refused(tmp_path: Path) -> None:
    two_tasks(tmp_path)
    package = tmp_path / "forgetful"
    (package / "conf" / "loss").mkdir(parents=True)
    (package / "__init__.py").write_text(FORGETFUL)
    (package / "conf" / "loss" / "forgetful.yaml").write_text("_target_: forgetful.Forgetful\n")
    cells = ["launch.nproc=2", "dist=ddp,single", "loss=token_mean,forgetful"]
    fast = [
        "debug=fast",
        "data.paths=[docs,code]",
        "output_dir=mine",
        "train.eval_every=2",
        "optimizer.lr=1e-2",
    ]
    flags = ["--at", "2", "--steps", "4", "--keep", "kept", "--plugin", "forgetful"]
    code, said = mft(tmp_path, "verify-resume", *fast, *cells, *flags)
    assert code == 1, said
    assert re.search(r"^1/4  passed   dist=ddp loss=token_mean  \d+ s$", said, re.M), said
    assert re.search(r"^3/4  refused  dist=single loss=token_mean  0 s: dist=single with 2", said, re.M), said
    value = r"0x1\.[0-9a-f]+p[+-]\d+"
    assert re.search(
        rf"^2/4  failed   dist=ddp loss=forgetful  \d+ s: step 3, train/loss: {value} uninterrupted, {value} resumed$",
        said,
        re.M,
    ), said
    assert "mft: 1 passed, 1 failed, 2 refused." in said and "output_dir=mine has no effect" in said
    assert not (tmp_path / "mine").exists() and not (tmp_path / "outputs").exists()
    resumed = tmp_path / "kept" / "cell-001" / "resumed"
    assert "resuming from step-2" in (resumed / "log" / "output.txt").read_text()
    assert run_folder.status(resumed) == "finished" and [*read(resumed)] == [0, 1]
    # the validation that the stop left out
    rows, _ = run_folder.metric_rows(resumed / "metrics.jsonl")
    assert [row["step"] for row in rows if "valid/loss" in row] == [0, 2, 4]


def test_a_run_that_ends_before_is_refused(tmp_path: Path) -> None:
    two_tasks(tmp_path)
    fast = ["debug=fast", "data.paths=[docs,code]", "data.limit=4", "train.epochs=1", "data=pad"]
    code, said = mft(tmp_path, "verify-resume", *fast, "--at", "1", "--steps", "100")
    assert code == 2 and re.search(r"refused .*--steps 100: the run has only \d+ steps", said), said
