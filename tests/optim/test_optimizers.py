import dataclasses
import math
from pathlib import Path

import pytest
import torch
from hydra import compose, initialize_config_dir
from hydra.utils import instantiate
from omegaconf import OmegaConf

from mft.errors import UserError
from mft.optim.optimizers import AdamW, AdamW8bit

CONF = Path(__file__).parents[2] / "conf"
NAMES = sorted(path.stem for path in (CONF / "optimizer").glob("*.yaml"))


def model():
    torch.manual_seed(0)
    return torch.nn.Sequential(
        torch.nn.Linear(64, 64), torch.nn.LayerNorm(64), torch.nn.Linear(64, 64, bias=False)
    )


def test_decay_is_for_matrices_and_only_trained_parameters_are_held():
    net = model()
    net[0].weight.requires_grad_(False)
    decayed, spared = AdamW(weight_decay=0.1).build(net.named_parameters(), 1e-4).param_groups
    assert decayed["weight_decay"] == 0.1 and decayed["params"] == [net[2].weight]
    assert spared["weight_decay"] == 0.0
    assert [id(p) for p in spared["params"]] == [id(p) for p in (net[0].bias, net[1].weight, net[1].bias)]


def test_learning_rate_follows_the_peft_mode_unless_given():
    net = model()
    assert AdamW().build(net.named_parameters(), 1e-5).param_groups[0]["lr"] == 1e-5
    assert AdamW(lr=3e-4).build(net.named_parameters(), 1e-5).param_groups[0]["lr"] == 3e-4


def test_nothing_trained_is_told():
    net = model().requires_grad_(False)
    with pytest.raises(UserError, match="no parameter of the model is trained"):
        AdamW().build(net.named_parameters(), 1e-4)


@pytest.mark.parametrize(
    "values",
    [{"lr": 0.0}, {"beta1": 1.0}, {"beta2": -0.1}, {"eps": -1.0}, {"weight_decay": -1}, {"eps": math.inf}],
)
def test_impossible_values_are_told(values):
    ((key, value),) = values.items()
    with pytest.raises(UserError, match=rf"optimizer\.{key}={value} must be"):
        AdamW(**values)


def trained(optimizer):
    net = model()
    live = optimizer.build(net.named_parameters(), 1e-3)
    x = torch.randn(32, 64, generator=torch.Generator().manual_seed(1))
    for _ in range(20):
        live.zero_grad()
        (net(x) - x.flip(1)).square().mean().backward()
        live.step()
    return torch.cat([parameter.detach().flatten() for parameter in net.parameters()])


def test_eight_bit_states_follow_those_of_32_bits():
    start = torch.cat([parameter.detach().flatten() for parameter in model().parameters()])
    full, small = trained(AdamW()) - start, trained(AdamW8bit()) - start
    assert torch.nn.functional.cosine_similarity(full, small, dim=0) > 0.99


def test_fused_is_the_loop():
    torch.testing.assert_close(trained(AdamW(fused=True)), trained(AdamW(fused=False)), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("name", NAMES)
def test_yaml_lists_every_field(name):
    with initialize_config_dir(str(CONF), version_base="1.3"):
        node = compose(overrides=[f"+optimizer={name}"]).optimizer
    optimizer = instantiate(node)
    fields = {field.name for field in dataclasses.fields(optimizer)}
    assert set(node) - {"_target_"} == fields
    schema = OmegaConf.structured(type(optimizer))
    assert OmegaConf.merge(schema, {key: node[key] for key in fields}) == schema
