"""What a rank needs of memory: predicted from the config, and measured in real steps."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks.memory import CELLS, compared, wrong
from mft.config.compose import compose_resolved
from mft.errors import UserError
from mft.estimate import rank
from mft.estimate.rank import PARTS, RankMemory, rank_memory
from mft.estimate.step import moments
from mft.model import step_trace
from mft.model.causal_lm import CausalLM
from mft.model.fake_model import Shortened
from mft.model.meta_model import skeleton
from mft.model.peft.full import Full
from mft.model.peft.lora import Lora
from mft.model.step_trace import Computing, Rows, trace_step
from mft.model.tiny import Tiny
from tests.estimate.models import made


def every_layer(model: Any, classes: list[str]) -> Shortened:
    layers = [part for part in model.modules() if type(part).__name__ in classes]
    return Shortened(model, layers, list(range(len(layers))))


def peak(family: CausalLM, peft: Full, computing: Computing) -> dict[str, float]:
    base = skeleton(family.config(), None, torch.float32)
    model = peft.attach(base, family)
    family.checkpoint(model)
    trace = trace_step(model, family, Rows(2, 64, 2), computing)
    _, _, parts = max(moments(trace), key=lambda moment: sum(moment[2].values()))
    return {name: size for name, size in parts.items() if size}


@pytest.mark.parametrize(
    ("name", "peft", "recomputed"),  # gemma 2 has layers of two kinds
    [
        ("llama", Lora(), 2),
        ("gemma2", Full(), False),
        *(
            pytest.param(name, peft, recomputed, marks=pytest.mark.long)
            for name in ("llama", "gemma2")
            for peft in (Full(), Lora())
            for recomputed in (False, True, 2)
            if (name, peft, recomputed) not in (("llama", Lora(), 2), ("gemma2", Full(), False))
        ),
    ],
)
def test_a_short_model_tells_of_the_whole_one(
    name: str, peft: Full, recomputed: Any, tmp_path_factory: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    family = CausalLM(str(made(name, tmp_path_factory.getbasetemp())), gradient_checkpointing=recomputed)
    computing = Computing("cpu", torch.bfloat16, None, None, "stay", adds_gradients=False)
    from_short = peak(family, peft, computing)
    monkeypatch.setattr(step_trace, "shorten", every_layer)
    assert from_short == peak(family, peft, computing)


def estimate(tmp_path: Path, cache_dir: Path, *overrides: str, world: int = 1, **options: Any) -> RankMemory:
    given = ["debug=fast", f"cache_dir={cache_dir}", f"output_dir={tmp_path}", "data.paths=[/tmp/rows.jsonl]"]
    return rank_memory(compose_resolved([*given, *overrides]), world, **options)


def test_a_gpu_is_told_from_a_cpu(tiny: Tiny, cache_dir: Path, tmp_path: Path) -> None:
    small = ("model.vocab_size=16384", "data.seq_length=2048", "peft=lora", "train.precision=bf16")
    gpu, cpu = (estimate(tmp_path, cache_dir, *small, device=device) for device in ("cuda", "cpu"))
    assert not gpu.notes and not cpu.notes
    # the chunk of a GPU holds all tokens of the micro-batch
    assert gpu.parts["logits"] > 2 * cpu.parts["logits"]
    assert gpu.parts["weights"] == cpu.parts["weights"]
    assert set(gpu.parts) <= set(PARTS) and gpu.step == sum(gpu.parts.values())
    assert gpu.peak == max(gpu.loading, gpu.step, gpu.saving)


@pytest.mark.parametrize("every", [0, 1, 2])
def test_fewer_activations_are_kept_where_layers_are_recomputed(
    every: int, tiny: Tiny, cache_dir: Path, tmp_path: Path
) -> None:
    long = ("data.seq_length=2048", "model.layers=8", "peft=lora", "train.precision=bf16")
    long += ("model.gradient_checkpointing=auto",)
    none, some = (estimate(tmp_path, cache_dir, *long, automatic=number) for number in (0, every))
    assert (none.every, some.every) == (0, every)
    assert (some.parts["activations"] < 0.7 * none.parts["activations"]) == (every > 0)


@pytest.mark.parametrize(
    ("dist", "moved"),
    [
        (("dist=fsdp", "dist.offload=true"), {"weights", "gradients", "optimizer"}),
        (("dist=zero2", "dist.offload_optimizer=true"), {"weights", "gradients", "optimizer", "buckets"}),
    ],
)
def test_what_is_offloaded_is_on_the_host(
    dist: tuple[str, ...], moved: set[str], tiny: Tiny, cache_dir: Path, tmp_path: Path
) -> None:
    one = estimate(tmp_path, cache_dir, "peft=full", *dist, world=2)
    assert {name for name, size in one.host.items() if size} == moved
    assert "optimizer" not in one.parts


def test_a_step_that_cannot_be_watched_is_estimated_by_shapes(tmp_path: Path, cache_dir: Path) -> None:
    """BLT has layers in several lists, and no one width."""
    import transformers

    small = {"hidden_size": 64, "num_attention_heads": 4, "num_hidden_layers": 2, "intermediate_size": 128}
    local = dict.fromkeys(("encoder_config", "decoder_config", "patcher_config"), small)
    wide = {"global_config": small | {"hidden_size": 128}}
    transformers.BltConfig(**local, **wide).save_pretrained(tmp_path / "blt")
    given = ("model=auto", f"model.path={tmp_path / 'blt'}", "data=pad", "train.precision=fp32")
    for peft, dist in (("full", "single"), ("lora", "zero3"), ("qlora", "fsdp")):
        one = estimate(
            tmp_path, cache_dir, *given, f"peft={peft}", f"dist={dist}", world=2 - (dist == "single")
        )
        # the gradients of its large tables of hashes are the peak of full training
        assert "activations" in one.parts or one.where == "exchange"
        assert one.notes and "by formula" in one.notes[0]


@pytest.mark.long
def test_rows_of_recurrent_layers_are_watched_in_part(
    tmp_path: Path, cache_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import transformers

    values = {"hidden_size": 64, "num_hidden_layers": 2, "vocab_size": 512, "state_size": 8}
    transformers.MambaConfig(**values).save_pretrained(tmp_path / "mamba")
    given = ("model=auto", f"model.path={tmp_path / 'mamba'}", "peft=full", "data=pad", "data.seq_length=64")
    whole = estimate(tmp_path, cache_dir, *given, device="cpu")
    monkeypatch.setattr(rank, "RECURRENT_TOKENS", 32)
    part = estimate(tmp_path, cache_dir, *given, device="cpu")
    assert not whole.notes and not part.notes
    assert part.parts == pytest.approx(whole.parts, rel=0.03)


def test_layers_that_turn_positions_in_ways_of_their_own_are_watched(tmp_path: Path, cache_dir: Path) -> None:
    import transformers

    values = {"hidden_size": 64, "num_hidden_layers": 3, "vocab_size": 512, "intermediate_size": 128}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 32}
    transformers.Gemma3TextConfig(**values, **heads).save_pretrained(tmp_path / "gemma3")
    given = ("model=auto", f"model.path={tmp_path / 'gemma3'}", "peft=lora")
    assert not estimate(tmp_path, cache_dir, *given).notes


def test_code_of_a_checkpoint_is_not_run_for_an_estimate(tmp_path: Path, cache_dir: Path) -> None:
    with pytest.raises(UserError, match="code of the checkpoint"):
        estimate(tmp_path, cache_dir, "model=auto", "model.path=x", "model.trust_remote_code=true")


FEW = ("gpt_neox qlora single 8 bits bf16", "llama full fsdp checkpointed bf16")


@pytest.mark.dist
@pytest.mark.parametrize(
    "names",
    [
        pytest.param(FEW, marks=pytest.mark.slow, id="few"),
        pytest.param([name for name in CELLS if name not in FEW], marks=pytest.mark.long, id="all"),
    ],
)
def test_a_real_step_holds_what_was_predicted(names: list[str], tmp_path: Path) -> None:
    cells = {name: CELLS[name] for name in names if not CELLS[name].startswith("model=demo")}
    faults = {name: wrong(one, other) for name, (one, other, _) in compared(cells, tmp_path).items()}
    assert not any(faults.values()), faults
