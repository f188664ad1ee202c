"""What is compared with the peers, and this project's lane; the peers themselves need environments of their own."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest

from benchmarks.peers.__main__ import ROOT, goal, require_alike, require_equal
from benchmarks.peers.peer_lane import as_neat_packing
from benchmarks.peers.turns import Lane
from benchmarks.peers.work import IGNORE, Row, Setting, necessary_flops, read, rows, write
from tests.tiny_runs import two_tasks

ROW = Row([5, 6, 7, 8, 9], [IGNORE, 6, IGNORE, 8, 9], [2, 3])


@pytest.mark.parametrize("rank", [None, 4])
def test_necessary_flops_are_those_that_torch_counts(rank: int | None) -> None:
    import torch
    from peft import LoraConfig, get_peft_model
    from torch.utils.flop_counter import FlopCounterMode
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "vocab_size": 40}
    config = LlamaConfig(**sizes, num_attention_heads=4, num_key_value_heads=2, tie_word_embeddings=True)
    model: Any = LlamaForCausalLM._from_config(config, attn_implementation="eager")
    if rank:
        model = get_peft_model(model, LoraConfig(r=rank, target_modules="all-linear", task_type="CAUSAL_LM"))
        model.enable_input_require_grads()  # all layers alike: the first one has a gradient of its input, too
    # samples of a single token: nothing above the diagonal is computed, and all of them carry loss
    ids = torch.arange(6)[:, None]
    with FlopCounterMode(display=False) as counter:
        model(input_ids=ids, use_cache=False).logits.sum().backward()
    row = Row(ids.flatten().tolist(), ids.flatten().tolist(), [1] * len(ids))
    assert counter.get_total_flops() == necessary_flops(row, config.to_dict(), rank)


def test_only_tokens_with_loss_need_the_head_and_only_samples_attend() -> None:
    sizes = {"hidden_size": 8, "intermediate_size": 16, "num_hidden_layers": 1, "vocab_size": 10}
    config = sizes | {"num_attention_heads": 2, "num_key_value_heads": 2}
    found = necessary_flops(ROW, config, rank=None)
    more_loss = necessary_flops(Row(ROW.ids, [IGNORE, 6, 7, 8, 9], ROW.lengths), config, rank=None)
    assert more_loss - found == 6 * 8 * 10
    one_sample = necessary_flops(Row(ROW.ids, ROW.labels, [5]), config, rank=None)
    assert one_sample - found == 12 * 8 * (15 - 3 - 6)


def test_a_row_reaches_the_peers_whole(tmp_path: Path) -> None:
    write([ROW, ROW], tmp_path / "rows.jsonl")
    assert read(str(tmp_path / "rows.jsonl")) == [ROW, ROW]
    packed = as_neat_packing(ROW, width=8, pad_id=1)
    assert packed["input_ids"] == [*ROW.ids, 1, 1, 1] and packed["labels"] == [*ROW.labels, *[IGNORE] * 3]
    assert packed["attention_mask"] == [1, 1, 2, 2, 2, 0, 0, 0]
    assert packed["position_ids"] == [0, 1, 0, 1, 2, 0, 0, 0]
    assert packed["packing_params"]["sequence_boundaries"] == [0, 2, 5, 8]


def test_lanes_that_do_other_work_are_refused() -> None:
    require_equal("TRL", 0, ROW, {"tokens": 5, "with_loss": 3})
    with pytest.raises(ValueError, match=r"TRL, step 1: \(5, 4\) tokens"):
        require_equal("TRL", 0, ROW, {"tokens": 5, "with_loss": 4})
    own = {"trained": 10, "loss": 3.0}
    require_alike({"mft": own, "TRL": {"trained": 10, "loss": 3.01}})
    with pytest.raises(ValueError, match="TRL trains 12 weights, mft 10"):
        require_alike({"mft": own, "TRL": {"trained": 12, "loss": 3.0}})
    with pytest.raises(ValueError, match="TRL trains weights in bfloat16, mft in float32"):
        require_alike({"mft": own, "TRL": own | {"dtypes": ["bfloat16"]}})
    with pytest.raises(ValueError, match=r"TRL begins with a loss of 3\.2000, mft 3\.0000"):
        require_alike({"mft": own, "TRL": {"trained": 10, "loss": 3.2}})


def test_a_goal_is_shown_beside_what_was_found() -> None:
    assert goal(1.936, 2.4, ">=") == "1.94 (>= 2.40)" and goal(1.936, None, ">=") == "1.94"


@pytest.mark.slow
def test_the_projects_own_lane_trains_the_rows_that_the_peers_get(tmp_path: Path, cache_dir: Path) -> None:
    tiny = ["model=tiny", two_tasks(tmp_path / "tasks"), f"cache_dir={cache_dir}"]
    overrides = [*Setting("tiny", seq_length=128, rank=4).overrides(steps=2)[1:], *tiny]
    expected, _ = rows(overrides, 2)
    arguments = ["run", str(tmp_path / "run"), str(ROOT), *overrides]
    lane = Lane("mft", Path(sys.executable), "own_lane", arguments, tmp_path / "log")
    try:
        for number, row in enumerate(expected):
            step = lane.step()
            require_equal("mft", number, row, step)
            assert step["seconds"] > 0 and step["loss"] > 0
    finally:
        lane.close()
    assert lane.facts["trained"] > 0


@pytest.mark.slow
def test_a_lane_that_cannot_start_says_what_it_printed(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match=r"(?s)^mft has ended:\n.*nowhere"):
        Lane("mft", Path(sys.executable), "own_lane", ["run", "x", str(ROOT), "nowhere=1"], tmp_path / "log")
