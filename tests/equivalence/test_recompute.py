"""Blocks that run again on the way back: the same bits for every family and method, and nothing more on the wire."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig

from tests.support.cloud_process import TOKEN, CloudProcess
from tests.support.parity import TokenBatch, randomise_adapter, token_batch
from tests.support.tiny_models import ALL_MODELS
from tidelock.device.model import DeviceModel
from tidelock.model.walk import Walk
from tidelock.peft.adapter import AdapterConfig
from tidelock.peft.core import CoreConfig
from tidelock.peft.lora import ALL_PROJECTIONS
from tidelock.run.connect import connect
from tidelock.wire.ledger import Ledger

_METHODS: dict[str, Any] = {
    "lora": LoraConfig(r=4, target_modules=[ALL_PROJECTIONS], lora_dropout=0.1),
    "lora above": LoraConfig(r=4, target_modules=[ALL_PROJECTIONS], layers_to_transform=[1, 3]),
    "adapter": AdapterConfig(bottleneck=4, places=("attn-out", "mlp")),
    "core": CoreConfig(rank=4),
}


def _outcome(model: DeviceModel, batch: TokenBatch) -> list[torch.Tensor]:
    """Return the loss, and every gradient, of one pass."""
    torch.manual_seed(3)
    randomise_adapter(model)
    loss = model(**batch.arguments()).loss
    loss.backward()
    model.close()
    return [loss.detach(), *(weight.grad for weight in model.parameters() if weight.grad is not None)]


@pytest.mark.parametrize(
    ("name", "method"),
    [*((name, "lora") for name in ALL_MODELS), *((name, method) for name in ("gpt2", "phi3") for method in _METHODS)],
)
def test_every_family_gives_the_same_bits(
    name: str, method: str, tiny_models: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    outcomes = []
    for recompute in (False, True):
        monkeypatch.setattr("tidelock.backbone.local.Walk", partial(Walk, recompute=recompute))
        model = connect("local", model=tiny_models / name, peft_config=_METHODS[method])
        outcomes.append(_outcome(model, token_batch("left")))
    assert len(outcomes[0]) > 1
    assert all(torch.equal(ours, again) for ours, again in zip(*outcomes, strict=True))


@pytest.mark.parametrize("method", _METHODS)
def test_so_does_a_cloud_with_no_byte_more(method: str, cloud: CloudProcess, tiny_models: Path) -> None:
    outcomes, crossed = [], []
    for service in ("llama", "llama_again"):
        ledger = Ledger()
        model = connect(
            cloud.url(service), model=tiny_models / "llama", peft_config=_METHODS[method], token=TOKEN, ledger=ledger
        )
        outcomes.append(_outcome(model, token_batch("right")))
        crossed.append({way: {**kinds, "control": 0} for way, kinds in ledger.totals().items()})
    assert all(torch.equal(ours, again) for ours, again in zip(*outcomes, strict=True))
    assert crossed[0] == crossed[1]
