from __future__ import annotations

import ast
import math
from dataclasses import MISSING, fields, replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

import tidelock
from tidelock.errors import CheckpointError, ConfigError
from tidelock.run.config import (
    _METHODS_OF,
    CACHE_CODECS,
    CODECS,
    CORE_FRAMES,
    LR_SCHEDULES,
    METHODS,
    SIDE_OUTPUTS,
    SIDE_STARTS,
    TASKS,
    UPSAMPLES,
    RunConfig,
)
from tidelock.schedule.schedule import Schedule

WHERE = Path("run") / "run.toml"
PLAIN = RunConfig(data="facts.jsonl", out="run", model="m")
# For each knob with a rule: values on its edges that are good, and bad ones.
EDGES: dict[str, tuple[list[Any], list[Any]]] = {
    "backbone": (["local"], ["pool", ""]),
    "codec": (list(CODECS), ["int3"]),
    "gradient_codec": ([None, *CODECS], ["fp16"]),
    "task": (list(TASKS), ["ranking"]),
    "num_labels": ([2], [1, 0]),
    "method": (["lora"], ["prefix"]),
    "lr_schedule": (list(LR_SCHEDULES), ["step"]),
    "in_flight": ([None, 1], [0]),
    "micro_batches": ([None, 1], [0]),
    "patience": ([0.0, 1e9], [-0.1, math.inf, math.nan]),
    "rank": ([1], [0]),
    "alpha": ([1e-9], [0.0, math.inf, math.nan]),
    "dropout": ([0.0, 0.99], [1.0, -0.1, math.nan]),
    "epochs": ([0.1], [0.0, math.inf]),
    "max_steps": ([1], [0]),
    "batch_size": ([1], [0]),
    "accumulate": ([1], [0]),
    "learning_rate": ([1e-9], [0.0, math.inf]),
    "warmup_steps": ([0], [-1]),
    "weight_decay": ([0.0], [-0.1, math.inf]),
    "bottleneck": ([1], [0]),
    "core_rank": ([1], [0]),
    "core_frames": (list(CORE_FRAMES), ["random"]),
    "core_scale": ([1e-9, 4.0], [0.0, -1.0, math.inf, math.nan]),
    "place": ([["mlp"], ["attn-out", "mlp"]], [[], ["attn"], ["mlp", "head"]]),
    "reduction": ([1], [0]),
    "side_init": (list(SIDE_STARTS), ["lottery"]),
    "fisher_examples": ([1], [0]),
    "upsample": ([None, *UPSAMPLES], ["one"]),
    "side_output": (list(SIDE_OUTPUTS), ["merge"]),
    "tap_width": ([1], [0]),
    "cache_codec": (list(CACHE_CODECS), ["int4"]),
    "clip": ([0.0], [-0.1, math.inf]),
    "max_length": ([1], [0]),
    "seed": ([0, 2**32 - 1], [-1, 2**32]),
    "log_every": ([1], [0]),
    "save_every": ([1], [0]),
    "eval_every": ([1], [0]),
    "keep": ([1], [0]),
    "threads": ([1], [0]),
}
RULED = [knob.name for knob in fields(RunConfig) if knob.metadata["rule"] is not None]


def test_the_edges_of_every_rule_are_listed() -> None:
    assert sorted(EDGES) == sorted(RULED)


@pytest.mark.parametrize("name", EDGES)
def test_a_knob_keeps_its_rule(name: str) -> None:
    good, bad = EDGES[name]
    task = "classification" if name == "num_labels" else "causal-lm"
    base = replace(PLAIN, method=_METHODS_OF.get(name, METHODS)[0], task=task)
    for value in good:
        assert getattr(replace(base, **{name: value}), name) == value
    for value in bad:
        with pytest.raises(ConfigError, match=f"^--{name.replace('_', '-')}: expected .*, got .*Change it"):
            replace(base, **{name: value})


@pytest.mark.parametrize(
    ("name", "value", "other"),
    [
        ("rank", 4, "adapter"),
        ("rslora", True, "core"),
        ("bottleneck", 8, "lora"),
        ("place", ["mlp"], "core"),
        ("core_rank", 8, "lora"),
        ("core_frames", "svd", "lora"),
        ("dropout", 0.1, "core"),
        ("target", ["q_proj"], "adapter"),
        ("reduction", 4, "lora"),
        ("cache", "taps", "adapter"),
        ("budget", 4, "side"),
        ("gradient_codec", "int8", "side"),
        ("no_share_prefix", True, "side"),
    ],
)
def test_a_knob_that_the_method_would_not_read_is_refused(name: str, value: object, other: str) -> None:
    methods = " or ".join(_METHODS_OF[name])
    with pytest.raises(ConfigError, match=f"^--{name.replace('_', '-')}: expected it with --method {methods} only, "):
        replace(PLAIN, method=other, **{name: value})  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("changes", "got"),
    [
        ({"backbone": "cloud"}, "got no --cloud"),
        ({"cloud": "grpcs://c:1"}, "got --cloud grpcs://c:1 with --backbone local"),
        ({"stochastic_rounding": True, "codec": "int8", "gradient_codec": "bf16"}, "in int8 or int4, got bf16"),
        ({"stochastic_rounding": True}, "in int8 or int4, got fp32"),
        ({"model": None}, "expected --model with --backbone local, got none"),
        ({"num_labels": 2}, "--num-labels: expected it with --task classification only, got --task causal-lm"),
        ({"num_labels": 2, "task": "regression"}, "only, got --task regression"),
        ({"schedule": "sleep"}, "Schedule's name: expected one of full, early-kill"),
        ({"method": "side", "no_cache": True, "cache_limit": "1GB"}, "--no-cache: expected no other option of a cache"),
        ({"method": "side", "cache_limit": "much"}, "Size: expected a number with a unit"),
        ({"budget": 4}, "Schedule's budget: expected none with the schedule full, got 4"),
        ({"schedule": "kill-revive", "exchange": 0.0}, "Schedule's exchange: expected more than 0 and at most 1"),
    ],
)
def test_knobs_that_contradict_each_other_are_refused(changes: dict[str, Any], got: str) -> None:
    with pytest.raises(ConfigError, match=got):
        replace(PLAIN, **changes)


@pytest.mark.parametrize("method", ["side", "lora", "adapter", "full"])
def test_a_pool_s_memory_is_limited_whatever_it_trains(method: str) -> None:
    assert replace(PLAIN, method=method, memory_limit="2GB").memory_limit == "2GB"


def test_a_cloud_may_bring_the_model() -> None:
    assert replace(PLAIN, backbone="cloud", cloud="grpcs://c:1", model=None).model is None


def test_a_cloud_may_be_elsewhere() -> None:
    there = PLAIN.elsewhere("grpcs://c:1", Path("token"), Path("ca.pem"))
    assert there == replace(PLAIN, backbone="cloud", cloud="grpcs://c:1", token_file="token", ca="ca.pem")
    assert PLAIN.elsewhere(None, None, None) == PLAIN
    assert there.elsewhere("grpcs://d:1", None, None) == replace(there, cloud="grpcs://d:1")


def test_every_knob_has_a_help_line_and_a_default_unless_it_must_be_given() -> None:
    for knob in fields(RunConfig):
        assert knob.metadata["help"].endswith(".")
        assert (knob.default is MISSING) == (knob.name in {"data", "out"})


def test_every_knob_is_read_somewhere() -> None:
    """A knob that nothing reads is a promise that nothing keeps."""
    package = Path(tidelock.__file__).parent
    sources = [path for folder in ("run", "cli") for path in (package / folder).glob("*.py") if path.stem != "config"]
    read = {
        node.attr
        for path in sources
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "config"
    }
    # Decides by itself, in `RunConfig`, whether `cloud` may be given.
    settled = {"backbone"}
    # Handed on by name; see test_a_schedules_knobs_are_its_switches.
    settled |= {"schedule", *(field.name for field in fields(Schedule))} - {"name", "seed"}
    assert {knob.name for knob in fields(RunConfig)} - read == settled


def test_a_schedules_knobs_are_its_switches() -> None:
    assert PLAIN.to_schedule() == Schedule()
    switches: dict[str, Any] = {
        "budget": 3,
        "warm_up": 2,
        "warm_up_active": 5,
        "period": 7,
        "exchange": 0.5,
        "longest_sleep": 9,
        "norm": "difference-of-norms",
        "per_learning_rate": True,
        "killed": "frozen",
        "moments": "keep",
        "seed": 4,
    }
    assert sorted([*switches, "name", "threshold"]) == sorted(field.name for field in fields(Schedule))
    config = replace(PLAIN, schedule="kill-revive", **switches)
    assert config.to_schedule() == Schedule("kill-revive", **switches)
    assert replace(PLAIN, schedule="early-kill", threshold=0.5).to_schedule() == Schedule("early-kill", threshold=0.5)


text = st.text(st.characters(codec="utf-8"), max_size=20)


@given(
    data=text,
    eval_data=st.none() | text,
    target=st.none() | st.lists(text, max_size=3),
    layer=st.none() | st.lists(st.integers(0, 99), max_size=3),
    learning_rate=st.floats(0, 1e30, exclude_min=True),
    seed=st.integers(0, 2**32 - 1),
    truncate=st.booleans(),
)
def test_a_configuration_survives_being_written(**knobs: Any) -> None:
    config = RunConfig(out="run", model="m", **knobs)
    assert RunConfig.from_toml(config.to_toml(), WHERE) == config


@pytest.mark.parametrize(
    "toml",
    [
        pytest.param("rank = ", id="no TOML"),
        pytest.param('data = "x"', id="a knob that must be there"),
        pytest.param(PLAIN.to_toml() + "colour = 1\n", id="an unknown knob"),
        pytest.param(PLAIN.to_toml().replace("rank = 8", "rank = 0"), id="a broken rule"),
        pytest.param(PLAIN.to_toml().replace("rank = 8", 'rank = "eight"'), id="another type"),
    ],
)
def test_what_tidelock_did_not_write_is_refused(toml: str) -> None:
    with pytest.raises(CheckpointError, match=rf"\({WHERE}\)\. Restore the file\.$"):
        RunConfig.from_toml(toml, WHERE)
