"""The page: read as a browser reads it, with Python's own parser."""

from __future__ import annotations

import base64
import xml.etree.ElementTree as ET
from html.parser import HTMLParser

import pytest

from tests.unit.report.conftest import EPOCHS, METRICS, OPTIONS
from tidelock.report.page import page_of
from tidelock.report.plots import plots_of
from tidelock.report.record import PoolRecord, RunRecord

HOSTILE = "</title><script>alert(1)</script><img src=http://evil.example/x onerror=alert(2)>&\"'"
# Attributes by which a page loads or leads somewhere.
LOADING = {"src", "srcset", "href", "data", "action", "background", "poster", "formaction", "xlink:href"}


class Page(HTMLParser):
    """What is in a page."""

    def __init__(self, record: RunRecord) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str, str]] = []
        self.texts: list[str] = []
        self.text = page_of(record, plots_of(record))
        self.feed(self.text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += [(tag, name, value or "") for name, value in attrs]

    def handle_data(self, data: str) -> None:
        if data.strip():
            self.texts.append(data.strip())

    def values(self, tag: str, name: str) -> list[str]:
        return [value for at, attribute, value in self.attributes if (at, attribute) == (tag, name)]

    def after(self, text: str) -> str:
        """Return the text that follows another."""
        return self.texts[self.texts.index(text) + 1]


def test_it_loads_nothing_and_runs_nothing(make_record) -> None:
    page = Page(make_record())
    assert not {"script", "link", "iframe", "object", "embed", "base", "a"} & set(page.tags)
    loads = [value for _, name, value in page.attributes if name in LOADING]
    assert len(loads) == 8  # four plots, light and dark
    assert all(value.startswith("data:image/svg+xml;base64,") for value in loads)
    assert not [name for _, name, _ in page.attributes if name.startswith("on")]
    assert "url(" not in page.text
    assert "@import" not in page.text
    # And the browser is told to hold to it.
    assert "default-src 'none'; img-src data:; style-src 'unsafe-inline'" in page.values("meta", "content")


def test_its_pictures_load_nothing_either(make_record) -> None:
    page = Page(make_record())
    for url in page.values("img", "src") + page.values("source", "srcset"):
        picture = ET.fromstring(base64.b64decode(url.partition(",")[2]))  # noqa: S314  (our own file)
        for element in picture.iter():
            links = [value for name, value in element.attrib.items() if name.endswith("href")]
            # The cells of the heat map are an image inside it.
            assert all(link.startswith(("#", "data:image/png;base64,")) for link in links)
            assert not element.tag.endswith("script")


def test_light_and_dark_have_pictures_of_their_own_and_words_for_who_sees_neither(make_record) -> None:
    page = Page(make_record())
    assert page.values("source", "media") == ["(prefers-color-scheme: dark)"] * 4
    assert not set(page.values("source", "srcset")) & set(page.values("img", "src"))
    assert all(len(text) > 30 for text in page.values("img", "alt"))
    assert "width=device-width, initial-scale=1" in page.values("meta", "content")


def test_names_and_options_are_text_whatever_is_in_them(make_record) -> None:
    page = Page(make_record(name=HOSTILE, options={**OPTIONS, "data": HOSTILE, HOSTILE: HOSTILE}))
    # One more row of options, and no other element.
    assert sorted(page.tags) == sorted([*Page(make_record()).tags, "tr", "th", "td"])
    assert HOSTILE in page.texts
    assert "<script" not in page.text
    assert "evil.example/x onerror" in page.text  # shown, as text


def test_it_says_what_the_run_is(make_record) -> None:
    page = Page(make_record())
    assert page.after("my-run · tidelock") != ""
    assert (
        "lora on 3 of 4 blocks of a llama model, 1,200 trained parameters; frozen blocks in a cloud; schedule "
        "kill-revive; 8 examples."
    ) in page.texts
    tiles = {
        "Steps": "4",
        "Epochs": "2 of 2",
        "Training loss": "1.0000",
        "Evaluation loss": "1.5000",
        "Evaluation loss, killed modules too": "1.2500",
        "Time per step": "3.0 s",
        "Crossed the wire": "23.5 kB",
    }
    assert {title: page.after(title) for title in tiles} == tiles
    assert page.after("training data") == "8 examples, 100 tokens, 20 with a loss"
    assert page.after("evaluation data") == "2 examples, 30 tokens, 6 with a loss"
    assert (page.after("torch"), page.after("site input")) == ("2.9", "19.0 kB")


@pytest.mark.parametrize("fetched", [0, 10**9])
def test_what_was_fetched_is_no_part_of_what_a_schedule_saves(make_record, fetched: int) -> None:
    first = {"epoch": 0, "sent": {}, "received": {"control": 500, "model": fetched}, "tokens": {}}
    record = make_record(epochs=(first, *EPOCHS[1:]))
    full = sum(epoch.full_fp32_bytes for epoch in record.traffic())
    assert Page(record).after("Against all modules in fp32") == f"{23520 / full:.1%}"


def test_a_local_run_without_schedule_and_evaluation(make_record) -> None:
    options = {**OPTIONS, "backbone": "local", "schedule": "full", "max_steps": 30, "layer": [1, 2], "insecure": False}
    page = Page(make_record(options=options, periods=(), epochs=(), metrics=METRICS[:1]))
    assert page.tags.count("figure") == 2
    assert "frozen blocks in this device's process" in " ".join(page.texts)
    assert not {"Crossed the wire", "Against all modules in fp32", "Evaluation loss", "Traffic by kind"} & set(
        page.texts
    )
    assert (page.after("Steps so far"), page.after("Epochs so far")) == ("1 of 30", "0.5")
    assert (page.after("layer"), page.after("insecure")) == ("1, 2", "no")


def test_a_run_in_a_pool_says_who_had_what(make_record) -> None:
    page = page_of(make_record(pool=PoolRecord("blocks 0 to 3 on peers 0, 1", ())), [])
    assert "frozen blocks in a pool (blocks 0 to 3 on peers 0, 1);" in page


def test_a_step_of_milliseconds(make_record) -> None:
    row = {"step": 1, "loss": 1.0, "timed_steps": 1, "seconds": {"device": 0.0425}}
    assert Page(make_record(metrics=(row,))).after("Time per step") == "42 ms"


def test_many_epochs_are_written_out(make_record) -> None:
    rows = ({"step": 9000, "loss": 1.0, "epoch": 1234.567},)
    assert Page(make_record(metrics=rows, options={**OPTIONS, "epochs": 5000.0})).after("Epochs so far") == (
        "1234.57 of 5000"
    )
