"""What all rows of a micro-batch begin with is computed once, and no loss, logit or gradient differs for it."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from peft import LoraConfig
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from tests.equivalence.conftest import Connect
from tests.support.cloud_process import TOKEN, CloudProcess
from tests.support.parity import (
    GRADIENT_TOLERANCE,
    LOSS_TOLERANCE,
    TokenBatch,
    assert_bit_equal,
    assert_same_pass,
    assert_same_sequence_pass,
    joined_oracle,
    plain_model,
    randomise_adapter,
    relative_error,
    token_batch,
)
from tests.support.tiny_models import BLOCKS, JOINED_MODELS, TINY_MODELS, UNVERIFIED_MODELS
from tidelock.backbone.local import LocalBackbone
from tidelock.backbone.protocol import AttemptSites, Pass
from tidelock.device.causal_lm import packed_ids
from tidelock.device.model import DeviceModel
from tidelock.model.cut import CutModel
from tidelock.model.rows import Rows
from tidelock.model.shared_prefix import share_prefixes
from tidelock.model.taps import TapPass, Taps
from tidelock.model.walk import Batch, Walk
from tidelock.peft.adapter import AdapterConfig
from tidelock.peft.core import CoreConfig
from tidelock.peft.lora import ALL_PROJECTIONS
from tidelock.run.connect import connect

# The first tokens of a row are labelled too: a prefix has labels, and each row its own for the last of its tokens.
_PREFIX, _LENGTHS = 12, (17, 15, 21)
_BATCH = token_batch("right", lengths=_LENGTHS, prefix=_PREFIX)
_METHODS: dict[str, Any] = {
    "lora": LoraConfig(r=4, target_modules=[ALL_PROJECTIONS]),
    "lora above": LoraConfig(r=4, target_modules=[ALL_PROJECTIONS], layers_to_transform=[1, 3]),
    "adapter": AdapterConfig(bottleneck=4, places=("attn-out", "mlp")),
    "core": CoreConfig(rank=4),
}
See = Callable[[DeviceModel], list[Rows]]


@pytest.fixture
def see(monkeypatch: pytest.MonkeyPatch) -> See:
    """Return a function that has the rows of all passes of a model noted in the list that it returns."""

    def see(model: DeviceModel) -> list[Rows]:
        forward, seen = model.backbone.forward, []

        def noted(batch: Batch, sites: AttemptSites) -> Pass:
            seen.append(batch.rows)
            return forward(batch, sites)

        monkeypatch.setattr(model.backbone, "forward", noted)
        return seen

    return see


def _outcome(model: DeviceModel, batch: TokenBatch = _BATCH) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    """Return the loss, the logits and every gradient of one pass with random modules."""
    randomise_adapter(model)
    model.zero_grad()
    torch.manual_seed(5)
    out = model(**batch.arguments())
    out.loss.backward()
    gradients = {name: weight.grad for name, weight in model.named_parameters() if weight.grad is not None}
    assert gradients
    return out.loss.detach(), out.logits.detach(), gradients


def _assert_close(
    ours: tuple[Tensor, Tensor, dict[str, Tensor]], theirs: tuple[Tensor, Tensor, dict[str, Tensor]]
) -> None:
    torch.testing.assert_close(ours[0], theirs[0], rtol=LOSS_TOLERANCE, atol=0)
    assert relative_error(ours[1], theirs[1]) <= LOSS_TOLERANCE
    assert ours[2].keys() == theirs[2].keys()
    for name, gradient in ours[2].items():
        assert float(theirs[2][name].norm()) > 1e-7, name
        assert relative_error(gradient, theirs[2][name]) <= GRADIENT_TOLERANCE, name


@pytest.mark.parametrize("name", JOINED_MODELS)
def test_every_family_that_joins_rows_equals_peft(name: str, join: Connect, tiny_models: Path, see: See):
    """Sliding windows shorter than the prefix and learned positions among them."""
    family_adds = TINY_MODELS[name][0] == "gpt2"
    config = LoraConfig(r=4, lora_alpha=12, target_modules=_targets(name), fan_in_fan_out=family_adds)
    device = join(name, config, share_prefix=True)
    oracle, rows = joined_oracle(device, tiny_models / name, config), see(device)
    assert_same_pass(device, oracle, _BATCH)
    assert [row.shared for row in rows] == [_PREFIX]
    assert rows[0].num_tokens == sum(_LENGTHS) - 2 * _PREFIX


def _targets(name: str) -> list[str]:
    fused = {"phi3": "qkv_proj", "bloom": "query_key_value", "gpt_neox": "query_key_value", "gpt2": "c_attn"}
    return [fused[TINY_MODELS[name][0]]] if TINY_MODELS[name][0] in fused else ["q_proj", "k_proj", "v_proj"]


@pytest.mark.parametrize("method", _METHODS)
@pytest.mark.parametrize("name", ["llama", "phi3_sliding", "gpt2"])
def test_every_method_equals_separate_rows(name: str, method: str, join: Connect, see: See):
    plain, shared = (join(name, _METHODS[method], share_prefix=share) for share in (False, True))
    rows = see(shared)
    _assert_close(_outcome(shared), _outcome(plain))
    assert [row.shared for row in rows] == [_PREFIX]


@pytest.mark.parametrize("name", ["llama", "gemma3_text", "opt"])
def test_evaluation_at_every_token_too(name: str, join: Connect, see: See):
    plain, shared = (join(name, _METHODS["lora"], share_prefix=share).eval() for share in (False, True))
    rows, logits = see(shared), []
    for model in (plain, shared):
        randomise_adapter(model)
        with torch.no_grad():
            logits.append(model(input_ids=_BATCH.input_ids, attention_mask=_BATCH.attention_mask).logits)
    assert [row.shared for row in rows] == [_PREFIX]
    assert relative_error(*logits) <= LOSS_TOLERANCE


def test_a_head_for_whole_texts_too(join: Connect, tiny_models: Path, see: See):
    config = LoraConfig(r=4, target_modules=_targets("llama"))
    device = join("llama", config, share_prefix=True, task="classification", num_labels=3)
    oracle, rows = joined_oracle(device, tiny_models / "llama", config), see(device)
    batch = TokenBatch(_BATCH.input_ids, _BATCH.attention_mask, torch.tensor([2, 0, 1]))
    assert_same_sequence_pass(device, oracle, batch)
    assert [row.shared for row in rows] == [_PREFIX]


def test_blocks_that_run_again_give_the_same_bits(tiny_models: Path, monkeypatch: pytest.MonkeyPatch, see: See):
    outcomes = []
    for recompute in (False, True):
        monkeypatch.setattr("tidelock.backbone.local.Walk", partial(Walk, recompute=recompute))
        model = connect(
            "local", model=tiny_models / "gemma3_text", peft_config=_METHODS["lora above"], share_prefix=True
        )
        rows = see(model)
        outcomes.append(_outcome(model))
        assert [row.shared for row in rows] == [_PREFIX]
    assert torch.equal(outcomes[0][0], outcomes[1][0])
    assert_bit_equal(outcomes[0][2], outcomes[1][2])


@pytest.mark.parametrize("service", ["llama", "llama_again"])
@pytest.mark.parametrize("method", _METHODS)
def test_a_cloud_gives_the_bits_of_this_process(service: str, method: str, cloud: CloudProcess, tiny_models: Path):
    outcomes = []
    for where in ("local", cloud.url(service)):
        model = connect(
            where,
            model=tiny_models / "llama",
            peft_config=_METHODS[method],
            token=TOKEN,
            share_prefix=True,
            micro_batches=2,
        )
        outcomes.append(_outcome(model))
        model.close()
    assert torch.equal(outcomes[0][0], outcomes[1][0])
    assert_bit_equal(outcomes[0][2], outcomes[1][2])


def test_each_micro_batch_shares_what_its_own_rows_begin_with(join: Connect, see: See):
    """Rows 0 and 1 have more in common than all four; the last two have it with each other."""
    batch = token_batch("none", lengths=(30,) * 4, prefix=_PREFIX)
    batch.input_ids[1, :20] = batch.input_ids[0, :20]
    plain, shared = (join("llama", _METHODS["lora"], share_prefix=share, micro_batches=2) for share in (False, True))
    rows = see(shared)
    _assert_close(_outcome(shared, batch), _outcome(plain, batch))
    assert sorted(row.shared for row in rows) == [_PREFIX, 20]


def test_a_batch_is_split_by_what_follows_the_prefix(tiny_models: Path, see: See):
    batch, outcomes, seen = token_batch("none", lengths=(60,) * 8, prefix=50), [], []
    for share in (False, True):
        model = connect("local", model=tiny_models / "llama", peft_config=_METHODS["lora"], share_prefix=share)
        rows = see(model)
        outcomes.append(_outcome(model, batch))
        seen.append([(len(row.lengths), row.shared) for row in rows])
    assert seen == [[(2, 0)] * 4, [(8, 50)]]
    _assert_close(outcomes[1], outcomes[0])


def test_with_few_modules_active(join: Connect, see: See):
    plain, shared = (join("llama", _METHODS["lora"], share_prefix=share) for share in (False, True))
    rows = see(shared)
    for model in (plain, shared):
        model.bank.activate({1, 3})
    _assert_close(_outcome(shared), _outcome(plain))
    assert [row.shared for row in rows] == [_PREFIX]


@pytest.mark.parametrize(
    "case", ["left", "nothing in common", "one row", "dropout", "padded", "an unknown family", "not asked for"]
)
def test_where_it_cannot_be_nothing_changes(case: str, tiny_models: Path, see: See):
    batch, name, config = _BATCH, "llama", _METHODS["lora"]
    if case == "left":
        batch = token_batch("left", lengths=_LENGTHS, prefix=_PREFIX)
    elif case == "nothing in common":
        batch = token_batch("right", lengths=_LENGTHS)
    elif case == "one row":
        batch = token_batch("right", lengths=(21,))
    elif case == "dropout":
        config = LoraConfig(r=4, target_modules=[ALL_PROJECTIONS], lora_dropout=0.3)
    elif case in {"padded", "an unknown family"}:
        name = "gemma2" if case == "padded" else next(iter(UNVERIFIED_MODELS))
    outcomes = []
    for share in (False, case != "not asked for"):
        model = connect("local", model=tiny_models / name, peft_config=config, share_prefix=share)
        rows = see(model)
        outcomes.append(_outcome(model, batch))
        assert [row.shared for row in rows] == [0]
    assert torch.equal(outcomes[0][0], outcomes[1][0])
    assert_bit_equal(outcomes[0][2], outcomes[1][2])


def test_with_dropout_it_is_shared_where_nothing_is_dropped_out(tiny_models: Path, see: See):
    config = LoraConfig(r=4, target_modules=[ALL_PROJECTIONS], lora_dropout=0.3)
    model = connect("local", model=tiny_models / "llama", peft_config=config, share_prefix=True).eval()
    rows = see(model)
    _outcome(model)
    assert [row.shared for row in rows] == [_PREFIX]


def test_a_block_computes_a_prefix_once(tiny_models: Path):
    tokens: dict[bool, list[int]] = {}
    for share in (False, True):
        model = connect("local", model=tiny_models / "llama", peft_config=_METHODS["lora"], share_prefix=share)
        assert isinstance(model.backbone, LocalBackbone)
        counted = tokens.setdefault(share, [])

        def count(_block: nn.Module, args: tuple[Tensor], counted: list[int] = counted) -> None:
            counted.append(args[0][..., 0].numel())

        for block in model.backbone._cut._blocks:
            cast("nn.Module", block.mlp).register_forward_pre_hook(count)
        _outcome(model)
    assert tokens[False] == [sum(_LENGTHS)] * BLOCKS
    assert tokens[True] == [sum(_LENGTHS) - 2 * _PREFIX] * BLOCKS


def test_rounding_is_all_that_differs(tiny_models: Path):
    """So that the tests above compare two ways of computing and not one with itself."""
    plain, shared = (
        _outcome(connect("local", model=tiny_models / "llama", peft_config=_METHODS["lora"], share_prefix=share))
        for share in (False, True)
    )
    assert any(not torch.equal(plain[2][name], shared[2][name]) for name in plain[2])


@pytest.mark.slow
def test_smollm2_equals_separate_rows(smollm2: Path, see: See):
    batch, outcomes = token_batch("right", lengths=(60, 52, 71, 66), prefix=40, vocab=40_000), []
    for share in (False, True):
        model = connect("local", model=smollm2, peft_config=_METHODS["lora"], share_prefix=share, micro_batches=1)
        rows = see(model)
        outcomes.append(_outcome(model, batch))
    assert [row.shared for row in rows] == [40]
    _assert_close(*outcomes)


@pytest.mark.parametrize("name", JOINED_MODELS)
def test_taps_are_those_of_separate_rows(name: str, tiny_models: Path):
    cut = CutModel(AutoModelForCausalLM.from_pretrained(tiny_models / name, dtype=torch.float32))
    rows = Rows.from_mask(_BATCH.attention_mask)
    with torch.no_grad():
        embeddings = plain_model(tiny_models / name).get_input_embeddings()(packed_ids(_BATCH.input_ids, rows))
    batch = Batch(embeddings, rows, torch.arange(rows.num_tokens), active={}, training=False)
    (packed,), number_M = share_prefixes([batch])
    assert packed.rows.shared == _PREFIX
    apart, once = (TapPass(cut, one, tuple(range(BLOCKS))).forward() for one in (batch, packed))
    for theirs, ours in zip(_all(apart), _all(once), strict=True):
        torch.testing.assert_close(ours[number_M], theirs, rtol=1e-4, atol=1e-4)


def _all(taps: Taps) -> tuple[Tensor, ...]:
    return (*taps.blocks, taps.final_MD)
