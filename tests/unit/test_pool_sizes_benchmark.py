"""Simulated pools of many sizes: what is computed by hand, and that the page shows what was found."""

from __future__ import annotations

import json

import pytest

from benchmarks import pool_sizes
from tests.architecture.source import ROOT

PAGE = (ROOT / "docs" / "pool.md").read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def result():
    return json.loads(pool_sizes.RESULTS.read_text())


def part(name: str) -> str:
    return PAGE.split(f"<!-- {name}: begin -->\n")[1].split(f"<!-- {name}: end -->")[0].strip()


def test_the_page_shows_what_was_found(result):
    assert part("pool_sizes") == pool_sizes.sizes_table(result)
    assert part("pool_gains") == pool_sizes.gains_sentence(result)
    assert part("pool_cache") == pool_sizes.cache_table(result)


def test_small_pools_are_found_again(result):
    kept = {(row["model"], row["pool"], row["devices"]): row for row in result["sizes"]}
    for model, kind in (("T5-Base", "equal"), ("BART-Large", "equal"), ("T5-Base", "unlike")):
        before = kept[model, kind, 2]
        found = pool_sizes.throughput(model, 2, kind, before["pools"])
        assert found == {name: value if value is None or isinstance(value, str) else pytest.approx(value)
                         for name, value in before.items()}  # fmt: skip


def test_a_plan_is_never_slower_than_the_other_layouts(result):
    for row in result["sizes"]:
        others = [row[name] for name in ("pipeline", "data parallel") if row[name] is not None]
        assert all(row["plan"] >= other * (1 - 1e-9) for other in others), row


def test_what_a_cache_saves_follows_from_the_two_steps(result):
    for row in result["cache"]:
        share = 1 - row["cached_step_seconds"] / row["step_seconds"]
        for epochs, saved in zip(pool_sizes.EPOCHS, row["saved_percent"], strict=True):
            assert saved == pytest.approx(100 * share * (epochs - 1) / epochs)
    assert pool_sizes.cached("BART-Large") == pytest.approx(
        {"model": "BART-Large", **{name: result["cache"][1][name] for name in ("step_seconds", "cached_step_seconds")},
         "saved_percent": pytest.approx(result["cache"][1]["saved_percent"])}
    )  # fmt: skip
