"""Imports point downwards only: which folder may import which, and what the cloud may see."""

from __future__ import annotations

from graphlib import CycleError, TopologicalSorter

import pytest

from tests.architecture.source import (
    TOP,
    Module,
    all_modules,
    folder,
    imports,
    is_ours,
    module_from_text,
    written_modules,
)

# Highest first. A folder imports from the lines below its own; folders on one line do not know each other.
LAYERS = (
    {TOP},
    {"cli"},
    {"run"},
    {"report"},
    {"pool"},
    {"device", "cloud", "privacy"},
    {"backbone", "cache"},
    {"peft"},
    {"model", "wire", "data", "plan", "schedule"},
    {"units"},
    {"errors"},
)
# Narrower than the layers: these folders import nothing else of ours.
ONLY = {
    "cloud": {"wire", "model", "schedule", "errors", "units"},  # runs where private text must not be
    "wire": {"errors", "units"},
    "plan": {"errors", "units"},
    "schedule": {"errors", "units"},
    "report": {"errors", "units"},  # draws what a run has written, and computes nothing
}
# The module on the device sees token ids, never text: only `run` and `cli` read data.
NEVER = {("device", "data")}
# plan and schedule decide with pure functions on frozen facts.
PURE = {"plan", "schedule"}
HEAVY = {"accelerate", "datasets", "grpc", "numpy", "peft", "torch", "transformers", "trl"}
# Only these name where the blocks run; all others are handed a backbone.
TRANSPORTS = {"tidelock.backbone.local", "tidelock.backbone.remote", "tidelock.backbone.pooled"}
NAME_TRANSPORTS = {TOP, "cli", "run", "backbone"}

RANK = {name: rank for rank, names in enumerate(reversed(LAYERS)) for name in names}


def violations(module: Module) -> list[str]:
    """Return one line for each import of ours that the layers forbid."""
    here = folder(module.name)
    found = []
    for name, line in sorted(imports(module)):
        there = folder(name)
        if not is_ours(name) or there == here:
            continue
        if there not in RANK or RANK[there] >= RANK[here]:
            reason = f"{there} is not below {here}"
        elif there not in ONLY.get(here, RANK):
            reason = f"{here} may import only {', '.join(sorted(ONLY[here]))}"
        elif (here, there) in NEVER:
            reason = f"{here} may not import {there}"
        elif name in TRANSPORTS and here not in NAME_TRANSPORTS:
            reason = "only run, cli and tests name a concrete transport"
        else:
            continue
        found.append(f"{module.where}:{line}: imports {name}: {reason}")
    return found


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("tidelock.wire.codec", "from tidelock.run import split"),
        ("tidelock.wire.codec", "import tidelock.model.cut"),
        ("tidelock.units", "import tidelock"),
        ("tidelock.errors", "from tidelock.units import parse_bytes"),
        ("tidelock.cloud.service", "import tidelock.peft.lora"),
        ("tidelock.cloud.service", "def late():\n    from tidelock.data import source"),
        ("tidelock.cloud.service", "from importlib import import_module\nimport_module('tidelock.backbone')"),
        ("tidelock.device.bank", "from tidelock.cloud import engine"),
        ("tidelock.device.bank", "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    import tidelock.data"),
        ("tidelock.privacy.leak", "import tidelock.backbone.remote"),
        ("tidelock.run.split", "import tidelock.utils"),
        ("tidelock.report.page", "from tidelock.wire.ledger import Kind"),
        ("tidelock.device.bank", "import tidelock.report.facts"),
    ],
)
def test_the_rule_sees_an_import_that_it_forbids(name: str, text: str) -> None:
    assert len(violations(module_from_text(name, text))) == 1


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("tidelock.peft.lora", "import peft\nfrom tidelock.peft import registry\nimport tidelock.model.families"),
        ("tidelock.units", "from tidelock.errors import ConfigError"),
        ("tidelock.run.split", "import tidelock.backbone.remote\nimport tidelock.device.module"),
        ("tidelock.run.report", "import tidelock.report.page"),
        ("tidelock.report.page", "from tidelock.units import format_bytes"),
        ("tidelock", "from tidelock.cli import main\nfrom tidelock.run import split"),
    ],
)
def test_the_rule_allows_what_points_down(name: str, text: str) -> None:
    assert violations(module_from_text(name, text)) == []


def test_every_folder_has_a_layer() -> None:
    assert {folder(module.name) for module in all_modules()} <= RANK.keys()


@pytest.mark.parametrize("module", written_modules(), ids=lambda module: module.name)
def test_imports_point_downwards(module: Module) -> None:
    assert violations(module) == []


def test_planning_and_scheduling_import_no_heavy_library() -> None:
    found = [
        f"{module.where}:{line}: imports {name}"
        for module in written_modules()
        if folder(module.name) in PURE
        for name, line in imports(module)
        if name.split(".")[0] in HEAVY
    ]
    assert found == []


def test_no_import_cycles() -> None:
    graph = {
        module.name: {name for name, _ in imports(module, typing_only=False) if is_ours(name)} - {module.name}
        for module in all_modules()
        if module.name != TOP
    }
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        pytest.fail(f"import cycle: {' -> '.join(error.args[1])}")
