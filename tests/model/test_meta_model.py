"""What a model's config.json contradicts is told before anything is loaded: these folders have no weights at
all."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest
import transformers

from mft.config.compose import compose_resolved
from mft.config.validate import check
from mft.errors import UserError
from mft.model.causal_lm import CausalLM
from mft.model.meta_model import has_experts, on_meta_device
from mft.model.peft.full import Full
from mft.model.peft.lora import Lora
from mft.model.peft.qlora import QLora
from tests.tiny_runs import two_tasks

CONFIGS = {  # of real sizes
    "dense": transformers.LlamaConfig(num_hidden_layers=32, tie_word_embeddings=True),
    "mixture": transformers.Qwen3MoeConfig(num_hidden_layers=48, num_experts=128, moe_intermediate_size=768),
    "shared": transformers.DeepseekV3Config(),
}
EXPERTS_GIB = 48 * 128 * 3 * 2048 * 768 * 2 / 2**30
"""Of 48 layers of 128 experts with three matrices of 2,048 x 768 in two bytes."""


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("configs")
    for name, config in CONFIGS.items():
        config.save_pretrained(root / name)
    return {name: root / name for name in CONFIGS}


@pytest.mark.parametrize(
    ("name", "peft", "message"),
    [
        ("dense", Lora(experts=True), r"peft\.experts=true: this model is not a mixture of experts"),
        ("dense", Lora(router=True), r"peft\.router=true: this model is not a mixture of experts"),
        ("dense", Lora(targets=["qproj"]), r"'qproj' matches no module; .*; did you mean q_proj"),
        ("dense", Lora(targets=r".*\.attn\..*"), r"the regular expression .* matches no module"),
        ("dense", Lora(targets=["lm_head"]), r"lm_head is one weight as embedding and output layer"),
        ("dense", Lora(modules_to_save=["lmhead"]), r"'lmhead' matches no module; .*; did you mean lm_head"),
        (
            "dense",
            QLora(skip_modules=["oproj"]),
            r"skip_modules: 'oproj' matches no module; .*; did you mean o_proj",
        ),
        (
            "dense",
            QLora(targets=["q_proj"], modules_to_save=["up_proj"]),
            r"up_proj is quantised; leave it out",
        ),
        (
            "dense",
            QLora(bits=8, targets=["q_proj"], modules_to_save=["up_proj"]),
            r"up_proj is quantised; leave it out",
        ),
        (
            "mixture",
            Lora(targets=["experts.down_proj"], dropout=0.1),
            r"dropout=0\.1 cannot be combined with an ada",
        ),
        (
            "mixture",
            Lora(targets=["gate"], use_dora=True),
            r"use_dora=true cannot be combined with an adapter",
        ),
        (
            "mixture",
            QLora(targets=["experts.down_proj"], dropout=0.1),
            r"dropout=0\.1 cannot be combined with an ada",
        ),
        ("shared", QLora(targets=["gate_proj"]), r"gate_proj is quantised, .*keep it unquantised with"),
    ],
)
def test_told_by_the_config_alone(name: str, peft: Lora, message: str, folders: dict[str, Path]) -> None:
    with pytest.raises(UserError, match=message):
        peft.check_against(CausalLM(str(folders[name])), "bf16")


def test_what_the_model_can_do_passes(folders: dict[str, Path]) -> None:
    dense, mixture = (CausalLM(str(folders[name])) for name in ("dense", "mixture"))
    Full().check_against(dense, "bf16")
    Lora(targets=["q_proj"], modules_to_save=["norm"], use_dora=True, init="pissa").check_against(
        dense, "bf16"
    )
    QLora(targets=["q_proj"], modules_to_save=["lm_head"], skip_modules=["o_proj"]).check_against(
        dense, "bf16"
    )
    QLora(skip_modules=["up_proj"], modules_to_save=["up_proj"], targets=["q_proj"]).check_against(
        dense, "bf16"
    )
    Lora(experts=True, router=True).check_against(mixture, "bf16")
    for name in ("nobody/nothing", "/nowhere"):  # nothing is known about it yet
        Lora(experts=True).check_against(CausalLM(name), "bf16")


def test_what_experts_take_beside_4_bits_is_told_before_loading(
    folders: dict[str, Path], caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING):
        QLora().check_against(CausalLM(str(folders["dense"])), "bf16")
        assert not caplog.text
        QLora().check_against(CausalLM(str(folders["mixture"])), "bf16")
    assert (
        f"the routed experts, 96% of all weights, stay in bfloat16 and take {EXPERTS_GIB:.4g} GiB"
        in caplog.text
    )
    assert f"{EXPERTS_GIB:.4g}" == "54"


def test_experts_are_found_also_inside_a_model_that_sees(folders: dict[str, Path], tmp_path: Path) -> None:
    assert [has_experts(CausalLM(str(folders[name]))) for name in CONFIGS] == [False, True, True]
    (tmp_path / "config.json").write_text(
        '{"text_config": {"num_local_experts": 16}, "vision_config": {"depth": 2}}'
    )
    assert has_experts(CausalLM(str(tmp_path))) and not has_experts(CausalLM("nobody/nothing"))


def test_a_skeleton_has_the_layers_and_no_weights(folders: dict[str, Path]) -> None:
    model = on_meta_device(CausalLM(str(folders["shared"])))
    assert model is not None and {p.device.type for p in model.parameters()} == {"meta"}
    assert sum(p.numel() for p in model.parameters()) > 600e9
    assert on_meta_device(CausalLM(str(folders["shared"]), trust_remote_code=True)) is None


def test_a_run_is_refused_before_it_starts(tmp_path: Path, cache_dir: Path) -> None:
    settings = ["model=tiny", f"cache_dir={cache_dir}", two_tasks(tmp_path), "peft=lora"]
    with pytest.raises(UserError, match=r"peft\.experts=true: this model is not a mixture of experts"):
        check(compose_resolved([*settings, "peft.experts=true"]), world=1)
    check(compose_resolved([*settings, "peft.targets=[q_proj]"]), world=1)
