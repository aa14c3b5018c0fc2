"""A device and a cloud that would compute differently with the same weights do not start."""

from __future__ import annotations

import json
from types import SimpleNamespace

import pytest
from transformers import LlamaConfig

from tidelock.errors import ConfigError, ModelMismatch, WireError
from tidelock.run.connect import _check_same_config, connect


def check(config_json, **device):
    connection = SimpleNamespace(
        description=SimpleNamespace(config_json=config_json), address=SimpleNamespace(url="grpcs://cloud:1")
    )
    _check_same_config(connection, LlamaConfig(**device))  # type: ignore[arg-type]


def theirs(**changes):
    return json.dumps({**LlamaConfig().to_dict(), **changes}, default=str)


def test_the_same_configuration_passes_whatever_it_was_read_from_and_computes_in():
    check(theirs())
    check(theirs(_name_or_path="/elsewhere", dtype="bfloat16", transformers_version="9.9", pad_token_id=7))
    check(theirs(a_setting_of_tomorrow=True))


@pytest.mark.parametrize(
    "setting", [{"rms_norm_eps": 0.5}, {"hidden_act": "gelu"}, {"num_key_value_heads": 1}, {"attention_bias": True}]
)
def test_one_that_computes_otherwise_is_refused_by_name(setting):
    with pytest.raises(ModelMismatch, match=f"to have {next(iter(setting))} = ") as caught:
        check(theirs(), **setting)
    assert "grpcs://cloud:1" in caught.value.message


def test_another_rope_base_is_refused():
    other = LlamaConfig(rope_parameters={"rope_type": "default", "rope_theta": 5e5})
    with pytest.raises(ModelMismatch, match="rope"):
        check(json.dumps(other.to_dict(), default=str))


@pytest.mark.parametrize("text", ["", "{", "[]", "null", "3"])
def test_what_is_no_configuration_is_refused(text):
    with pytest.raises(WireError, match="no JSON object"):
        check(text)


@pytest.mark.parametrize(
    ("task", "num_labels"),
    [("causal-lm", 2), ("classification", None), ("classification", 1), ("regression", 2), ("ranking", None)],
)
def test_a_task_and_a_number_of_labels_that_contradict_each_other_are_refused_at_once(task, num_labels):
    with pytest.raises(ConfigError, match=f"^Task: expected one of causal-lm, .* got task='{task}' with num_labels="):
        connect("grpcs://nobody:1", task=task, num_labels=num_labels)
