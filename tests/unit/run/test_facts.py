from __future__ import annotations

from importlib.metadata import version

from tidelock.data.encode import TokenRow
from tidelock.report.facts import DataFacts, SiteFacts
from tidelock.run.facts import facts_of
from tidelock.run.open_model import open_model
from tidelock.wire.ledger import Ledger


def test_facts_are_those_of_the_model_and_the_data(make_config) -> None:
    model = open_model(make_config(layer=[0, 2], target=["q_proj", "v_proj"], rank=2), Ledger())
    row: TokenRow = {"input_ids": [1, 2, 3, 4], "labels": [1, -100, 3, 4]}
    facts = facts_of(model, [row, row], [])
    # 32 numbers of query heads and 16 of value heads.
    sites = tuple(SiteFacts(name=f"blocks.{n}.attn", block=n, input_width=32, output_width=48) for n in (0, 2))
    assert facts.model.sites == sites
    assert (facts.model.num_blocks, facts.model.embedding_width, facts.model.final_width) == (3, 32, 32)
    assert facts.model.trained_parameters == sum(parameter.numel() for parameter in model.parameters())
    # The first token of a row is predicted by none, labelled or not.
    assert facts.train == DataFacts(examples=2, tokens=8, labelled=4)
    assert facts.evaluation == DataFacts(examples=0, tokens=0, labelled=0)
    assert facts.versions["tidelock"] == version("tidelock")
