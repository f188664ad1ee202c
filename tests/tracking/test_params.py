"""Names, values and secrets, as they reach a tracker."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mft.console.credentials import filled, hidden, without_credentials
from mft.tracking.params import KEY_LIMIT, VALUE_LIMIT, flattened, safe_name


def test_config_becomes_dotted_keys_and_yaml_values():
    config = {
        "optimizer": {"lr": 1e-5, "fused": True},
        "task": {"a b": {"paths": ["x", "y"]}},
        "peft": None,
        "empty": {},
    }
    assert flattened(config) == {
        "optimizer.lr": "1e-05",
        "optimizer.fused": "true",
        "task.a b.paths": '["x", "y"]',
        "peft": "null",
        "empty": "{}",
    }


def test_long_keys_and_values_are_cut_and_stay_apart():
    names = {safe_name("k" * 300 + tail) for tail in ("a", "b")}
    assert len(names) == 2 and max(map(len, names)) <= KEY_LIMIT
    assert len(flattened({"a": "x" * 10_000})["a"]) <= VALUE_LIMIT


def test_usual_names_stay_and_refused_characters_go():
    for name in ("valid/loss/unit_test", "speed/tokens_per_second", "a b-c.d:e", "äöü/任务"):
        assert safe_name(name) == name
    assert safe_name("valid/pass@1") == "valid/pass_at_1"
    assert safe_name("a[1]") != safe_name("a(1)") != safe_name("a_1_")


@settings(deadline=None)  # the first call imports mlflow
@given(st.text(max_size=300))
def test_mlflow_accepts_every_name(name):
    from mlflow.utils.validation import _validate_metric_name

    assert len(safe_name(name)) <= KEY_LIMIT
    _validate_metric_name(safe_name(name))


@pytest.mark.parametrize(
    "text",
    [
        "http://user:secret@host:5000/x",
        "tracking.mlflow.uri=postgresql+psycopg2://me:se%2Fcret@db/mlflow",
        "see https://secret@host and http://a:b@c",
        "https://host/api?password=secret&x=1",
    ],
)
def test_credentials_of_addresses_are_hidden(text):
    assert "secret" not in hidden(text) and "cret@" not in hidden(text) and "***" in hidden(text)
    assert "secret" not in without_credentials(text)


@pytest.mark.parametrize("password", ["secret?x", "x#secret", "a/secret", "s ecret", "se'cret", "ü@secret"])
def test_passwords_of_odd_characters_are_cut_off_addresses(password, monkeypatch):
    uri = f"http://user:{password}@127.0.0.1:9"
    assert without_credentials(uri) == "http://127.0.0.1:9"
    monkeypatch.setenv("MFT_TEST_STORE", uri)
    assert filled("${oc.env:MFT_TEST_STORE}") == uri
    assert hidden(f"Invalid url: {uri}/api") == "Invalid url: ${oc.env:MFT_TEST_STORE}/api"


def test_what_holds_no_credentials_is_left_alone():
    for text in ("http://host:5000/a@b", "user@example.org", "task=[a,b] pass@1", "sqlite:////x/mlflow.db"):
        assert hidden(text) == text == without_credentials(text)
