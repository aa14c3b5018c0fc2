"""docs/pool.md says of profiles, plans and figures what is so."""

from __future__ import annotations

import json
import re

import pytest
from pydantic import BaseModel

from tests.architecture.source import ROOT
from tests.support.scripts import load_script
from tidelock.plan import inputs
from tidelock.plan.plan import make_plan
from tidelock.plan.words import plan_text

PAGE = (ROOT / "docs" / "pool.md").read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def benchmark():
    return load_script(ROOT / "benchmarks" / "planner.py")


@pytest.fixture(scope="module")
def result(benchmark):
    return json.loads(benchmark.RESULTS.read_text())


def part(name: str) -> str:
    return PAGE.split(f"<!-- {name}: begin -->\n")[1].split(f"<!-- {name}: end -->")[0].strip()


def test_every_field_of_a_profile_is_listed():
    listed = set(re.findall(r"`([\w.*]+)`", "\n".join(re.findall(r"^\| (`.*?) \|", PAGE, re.MULTILINE))))

    def names(model: type[BaseModel], prefix: str = "") -> set[str]:
        return {f"{prefix}{name}" for name in model.model_fields}

    assert listed == (
        names(inputs.Profile) - {"links"}
        | names(inputs.Block, "blocks.")
        | names(inputs.Device, "devices.")
        | names(inputs.Links, "links.")
        | names(inputs.Link, "links.*.")
    )


def test_the_example_on_the_page_is_a_profile_that_can_be_planned():
    (text,) = re.findall(r"^```json\n(.*?)^```", PAGE, re.MULTILINE | re.DOTALL)
    plan = make_plan(inputs.parse_profile(text, "docs/pool.md"), 16)
    assert plan.is_proved
    assert [[device.name for device in stage.devices] for stage in plan.stages] == [["phone"], ["laptop"]]
    assert plan_text(plan).startswith("three blocks with a side network: 2 stages, ")


def test_the_example_file_is_what_is_derived(benchmark):
    path = ROOT / "examples" / "nanos-bart-large.json"
    assert json.loads(path.read_text(encoding="utf-8")) == benchmark.nano_profile("BART-Large", 4)


def test_tables_are_those_of_the_results(benchmark, result):
    assert part("figure_10") == benchmark.figure_table(result["figure_10"])
    assert part("planner").endswith(benchmark.planning_table(result["planning"]))


def test_pacs_figure_10_is_reproduced_but_for_two_groupings_of_t5_large(benchmark, result):
    figure = benchmark.figure_10()
    assert [{**row, "seconds": row["seconds"] and pytest.approx(row["seconds"])} for row in figure] == [
        {**row, "paper_costs_more": row["paper_costs_more"] and pytest.approx(row["paper_costs_more"], abs=1e-9)}
        for row in result["figure_10"]
    ]
    other = {(row["model"], row["devices"]): row["plan"] for row in figure if row["plan"] != row["paper"]}
    assert other == {("T5-Large", 4): "1-1-1-1", ("T5-Large", 8): "2-3-3"}
    assert all(row["paper_costs_more"] < 0.05 for row in figure if row["plan"] != row["paper"])
