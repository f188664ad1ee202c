"""What makes two runs the same experiment: every input is walked.

`python -m tests.config.test_identity` writes the defaults anew, after VERSION was raised or new fields were
added.
"""

from __future__ import annotations

import importlib
import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from omegaconf import DictConfig, OmegaConf

from mft.config import inputs, plugins
from mft.config.compose import compose_resolved
from mft.config.identity import CONTENTS, VERSION, Identity
from mft.config.inputs import CANNOT_CHANGE_THE_RESULT, FINGERPRINTED, under
from mft.config.schema import config_dir
from mft.launch import job
from mft.loss.means import TokenMean
from mft.model.causal_lm import CausalLM
from mft.model.peft.full import Full
from mft.model.peft.lora import Lora
from tests.tiny_runs import write_task

DEFAULTS = Path(__file__).parents[1] / "fixtures" / "identity_defaults.json"
GOLDEN = "5c2938edea12404ea7128a06cffbc9d6120cdee4"


def nodes() -> list[tuple[str, DictConfig]]:
    """Returns (path in a config, node) of one yaml for every class that conf/ names."""
    found: dict[tuple[str, str], DictConfig] = {}
    for path in sorted(config_dir().rglob("*.yaml")):
        group = path.relative_to(config_dir()).parts[0]
        node = OmegaConf.load(path)
        assert isinstance(node, DictConfig)
        place = {
            "data": "data.rows",
            "format": "task.x.format",
            "task": "task.x",
            "tracking": "tracking.x",
        }.get(group)
        node = node.get("rows") if group == "data" else node
        if node is not None and "_target_" in node:
            node.pop("defaults", None)
            found.setdefault((place or group, node._target_), node)
    assert len(found) > 35
    return [(place, node) for (place, _), node in found.items()]


NODES = nodes()


def class_of(node: DictConfig) -> type:
    module, _, name = str(node._target_).rpartition(".")
    found = getattr(importlib.import_module(module), name)
    assert isinstance(found, type)
    return found


def placed(place: str, node: DictConfig) -> DictConfig:
    """Returns a config that has the node at its place, resolved and without types, so that anything can be
    set."""
    cfg = OmegaConf.create(OmegaConf.to_container(BASE(), enum_to_str=True))
    if place == "task.x.format":
        node = OmegaConf.create({"_target_": "mft.data.task.Task", "format": node})
        place = "task.x"
    OmegaConf.update(cfg, place, node, merge=False, force_add=True)
    if place == "model" and OmegaConf.is_missing(cfg.model, "path"):
        cfg.model.path = "owner/name"
    plain = OmegaConf.create(OmegaConf.to_container(cfg, resolve=True))
    assert isinstance(plain, DictConfig)
    return plain


def BASE() -> DictConfig:
    """The config without any choice."""
    return compose_resolved(["model=tiny", "output_dir=/o", "cache_dir=/c"])


def leaves(node: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    for key in node:
        value, below = node[key], f"{path}.{key}" if path else str(key)
        if isinstance(value, DictConfig) and len(value):
            yield from leaves(value, below)
        elif key != "_target_":
            yield below, value


def another(value: Any) -> Any:
    """Returns another value of the same kind."""
    if isinstance(value, bool):
        return not value
    if isinstance(value, int | float):
        return value + 3
    if value is None:
        return 7
    return f"{value}x" if isinstance(value, str) else [*value, "x"] if OmegaConf.is_list(value) else {"x": 1}


# ── what enters ──


@pytest.mark.parametrize(
    ("place", "node"), NODES, ids=[f"{p}-{n._target_.rpartition('.')[2]}" for p, n in NODES]
)
def test_every_value_enters_or_is_listed_with_a_reason(place: str, node: DictConfig) -> None:
    cfg = placed(place, node)
    before = inputs.config_parts(cfg)
    walked = [
        (path, value) for path, value in leaves(cfg) if place.startswith("data") or under(path, [place])
    ]
    for path, value in walked:
        OmegaConf.update(cfg, path, another(value), merge=False)
        enters = inputs.config_parts(cfg) != before
        listed = under(path, [*CANNOT_CHANGE_THE_RESULT, *FINGERPRINTED])
        assert enters != listed, (
            f"{path} {'is listed and enters' if enters else 'neither enters nor is listed'}"
        )
        OmegaConf.update(cfg, path, value, merge=False)
    assert walked or not [key for key in node if key != "_target_"]


def test_nothing_is_listed_that_is_no_input() -> None:
    cfgs = [
        placed(place, node)
        for place, node in NODES
        if place in ("model", "peft", "dist", "task.x", "tracking.x")
    ]
    paths = {path for cfg in cfgs for path, _ in leaves(cfg)} | {"task.x.valid"}
    for listed, reason in {**CANNOT_CHANGE_THE_RESULT, **FINGERPRINTED}.items():
        assert reason and any(under(path, [listed]) for path in paths), listed


def test_every_component_has_a_public_name_of_its_own_in_its_group() -> None:
    names: dict[str, dict[str, type]] = {}
    for place, node in NODES:
        cls = class_of(node)
        name = vars(cls).get("public_name")
        assert isinstance(name, str) and name, f"{cls.__name__} has no public_name of its own"
        assert names.setdefault(place, {}).setdefault(name, cls) is cls, (
            f"{place}: two classes are called {name}"
        )


def test_a_moved_class_keeps_the_identity_and_a_foreign_one_enters_by_its_target(monkeypatch) -> None:
    import mft.loss.base as elsewhere

    cfg = placed("loss", OmegaConf.create({"_target_": "mft.loss.means.TokenMean"}))
    before = inputs.config_parts(cfg)
    monkeypatch.setattr(elsewhere, "Renamed", TokenMean, raising=False)
    cfg.loss._target_ = "mft.loss.base.Renamed"
    monkeypatch.setattr(plugins, "_named", {"tests": None})
    assert inputs.config_parts(cfg) == before and before[0]["loss"] == "token_mean"
    cfg.loss._target_ = "tests.config.test_identity.Ours"
    choices, _ = inputs.config_parts(cfg)
    assert choices["loss"] == "tests.config.test_identity.Ours"
    cfg.loss.power = 1
    assert "loss.power" in inputs.config_parts(cfg)[1], "its defaults are not known to us"


class Ours(TokenMean):
    """A loss of somebody else's."""

    public_name = "token_mean"


def defaults() -> dict[str, Any]:
    """Returns the defaults of all that can enter: of the settings, of every class of conf/, and those in
    code."""
    found: dict[str, Any] = {
        f"settings/{name}": inputs.defaults(cls) for name, cls in inputs.SETTINGS.items()
    }
    for place, node in NODES:
        found[f"{place}/{class_of(node).public_name}"] = inputs.defaults(class_of(node))
    found["peft default_lr"] = {"full": Full().default_lr, "lora": Lora().default_lr}
    return json.loads(json.dumps(found, default=lambda named: {"component": named.name}))


def test_defaults_are_those_of_this_version() -> None:
    """Defaults stay out of the hash, so a changed one would make two experiments look the same."""
    written, now = json.loads(DEFAULTS.read_text()), defaults()
    assert written.pop("version") == VERSION, "run python -m tests.config.test_identity"
    for name, fields in written.items():
        changed = [key for key, value in fields.items() if now.get(name, {}).get(key, "gone") != value]
        assert not changed, f"{name}: {changed} have other defaults: raise mft.config.identity.VERSION"
    new = {name for name, fields in now.items() if fields.keys() != written.get(name, {}).keys()}
    assert not new, (
        f"{new}: new fields; if their defaults change no result, run python -m tests.config.test_identity"
    )


def test_the_hash_is_that_of_this_version() -> None:
    overrides = [
        "model=tiny",
        "output_dir=/o",
        "cache_dir=/c",
        "data.paths=[/d/x]",
        "loss=coba",
        "optimizer.lr=1e-3",
    ]
    cfg = compose_resolved([*overrides, "train.precision=fp32"])
    found = inputs.identity(cfg, 2, ["x"], {"task.x": "1", "base model": "2"})
    assert found.choices["loss"] == "coba" and found.choices["global batch"] == "8"
    assert (
        "optimizer.lr" in found.values and "loss.tau" not in found.values and "train.seed" not in found.values
    )
    assert found.extended == GOLDEN, "another hash: raise mft.config.identity.VERSION"


def test_equal_values_written_otherwise_are_equal() -> None:
    def parts(*overrides: str) -> Any:
        cfg = compose_resolved(["model=tiny", "cache_dir=/c", "output_dir=/o", *overrides])
        return inputs.config_parts(cfg)

    assert parts("peft.alpha=16") == parts("peft.alpha=16.0") != parts("peft.alpha=17")
    assert parts("data.split=[95,5,0]") == parts("data.split=[95.0,5.0,0.0]") == parts()
    assert parts("loss=case3") == parts("loss=task_token_mean")
    assert parts("model.cache_dir=/elsewhere") == parts()
    assert parts("data.role_markers={user: U}") != parts("data.role_markers={user: V}") != parts()
    assert parts("loss=famo", "loss.min_loss_by_task={a: 1}") != parts(
        "loss=famo", "loss.min_loss_by_task={a: 2}"
    )


# ── what is read ──


@pytest.fixture
def checkpoint(tiny_folder: Path, tmp_path: Path) -> Path:
    """A base model of one's own, with every kind of tokenizer file."""
    folder = shutil.copytree(tiny_folder, tmp_path / "base")
    (folder / "chat_template.jinja").write_text("{{ eos_token }}")
    (folder / "generation_config.json").write_text('{"eos_token_id": 0}')
    (folder / "special_tokens_map.json").write_text("{}")
    (folder / "modeling.py").write_text("pass")
    return folder


@pytest.mark.parametrize(
    ("file", "changed"),
    [
        ("tokenizer.json", "tokenizer"),
        ("tokenizer_config.json", "tokenizer"),
        ("special_tokens_map.json", "tokenizer"),
        ("chat_template.jinja", "tokenizer"),
        ("generation_config.json", "tokenizer"),
        ("added_tokens.json", "tokenizer"),
        ("vocab.txt", "tokenizer"),
        ("merges.txt", "tokenizer"),
        ("tokenizer.model", "tokenizer"),
        ("config.json", "base model"),
        ("modeling.py", "code"),
        ("README.md", None),
    ],
)
def test_each_file_of_the_base_is_part_of_a_fingerprint(
    checkpoint: Path, file: str, changed: str | None
) -> None:
    family = CausalLM(str(checkpoint), trust_remote_code=True)
    before = family.fingerprints()
    with (checkpoint / file).open("a") as stream:
        stream.write(" ")
    after = family.fingerprints()
    assert [name for name in before if before[name] != after[name]] == ([changed] if changed else [])
    assert set(before) <= set(CONTENTS)
    assert "code" not in CausalLM(str(checkpoint)).fingerprints(), "code that is not run"


@pytest.mark.parametrize("file", ["model.safetensors", "pytorch_model.bin"])
def test_each_byte_of_the_weights_of_a_small_base_counts(checkpoint: Path, file: str) -> None:
    weights = checkpoint / file
    if not weights.exists():
        weights.write_bytes((checkpoint / "model.safetensors").read_bytes())
    content, before = weights.read_bytes(), CausalLM(str(checkpoint)).fingerprints()
    for place in range(len(content) // 2, len(content), len(content) // 40):
        weights.write_bytes(content[:place] + bytes([content[place] ^ 1]) + content[place + 1 :])
        assert CausalLM(str(checkpoint)).fingerprints()["base model"] != before["base model"], place


def test_moved_contents_are_the_same_run(tmp_path: Path, checkpoint: Path) -> None:
    def identity(root: Path) -> Identity:
        overrides = [
            "model=auto",
            f"model.path={root}/base",
            f"cache_dir={tmp_path}/cache",
            f"data.paths=[{root}/x]",
        ]
        cfg = compose_resolved([*overrides, f"data.template={root}/t.jinja", "launch=inline", "dist=single"])
        return job.checked(cfg, []).identity

    write_task(tmp_path / "x", 8)
    (tmp_path / "t.jinja").write_text("{% for m in messages %}{{ m.content }}{{ eos_token }}{% endfor %}")
    (tmp_path / "moved").mkdir()
    for name in ("base", "x"):
        shutil.copytree(tmp_path / name, tmp_path / "moved" / name)
    shutil.copy(tmp_path / "t.jinja", tmp_path / "moved" / "t.jinja")
    first, moved = identity(tmp_path), identity(tmp_path / "moved")
    assert first == moved and set(first.fingerprints) == {"task.x", "base model", "tokenizer", "template"}


if __name__ == "__main__":
    DEFAULTS.write_text(json.dumps({"version": VERSION} | defaults(), indent=1, sort_keys=True) + "\n")
