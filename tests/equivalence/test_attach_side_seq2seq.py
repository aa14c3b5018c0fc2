"""A side network beside an ordinary T5 or BART computes and generates as it does in tidelock."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForSequenceClassification, PreTrainedModel
from transformers.modeling_outputs import BaseModelOutput

import tidelock
from tests.equivalence.test_side_seq2seq import pairs
from tests.support.parity import IGNORED, LOSS_TOLERANCE, relative_error
from tests.support.plain_seq2seq import TINY_SEQ2SEQ, side_seq2seq, tiny_seq2seq
from tests.support.plain_side import randomise_side
from tidelock.backbone.local_seq2seq import LocalSeq2Seq
from tidelock.device.generate import GenerationSettings
from tidelock.device.side_seq2seq import SideSeq2SeqModel
from tidelock.errors import CheckpointError, ConfigError
from tidelock.peft.adapter_files import CONFIG_FILE
from tidelock.peft.export import load_adapter
from tidelock.peft.side import SideConfig

ALONE = SideConfig(init="random", output="alone", zero_upsample=False)
ADDED = SideConfig(init="random", zero_upsample=False, taps=(0, 2), reduction=2)
NEW_TOKENS = 6


def attached(name: str, saved: Path, config: SideConfig = ALONE) -> tuple[SideSeq2SeqModel, PreTrainedModel]:
    """Return a side model in tidelock, and a plain model with what that one saved."""
    plain = tiny_seq2seq(name)
    ours = side_seq2seq(plain, config).eval()
    randomise_side(ours)
    ours.save_adapter(saved, "some/model")
    tidelock.attach_side(plain, saved)
    return ours, plain


def generated(plain: Any, batch: dict[str, Tensor], **settings: Any) -> Tensor:
    torch.manual_seed(3)
    ids: Tensor = plain.generate(
        input_ids=batch["input_ids"],
        attention_mask=batch["attention_mask"],
        max_new_tokens=NEW_TOKENS,
        eos_token_id=None,
        **{"do_sample": False, **settings},
    )
    return ids


@pytest.mark.parametrize("name", ["t5", "bart"])
def test_what_was_saved_computes_the_same_bit_for_bit(name: str, tmp_path: Path):
    ours, _ = attached(name, tmp_path)
    assert json.loads((tmp_path / CONFIG_FILE).read_text())["base_model_name_or_path"] == "some/model"
    adapter = load_adapter(tmp_path)
    assert adapter.config == ALONE
    again = side_seq2seq(tiny_seq2seq(name), SideConfig(init="random", output="alone", zero_upsample=False, seed=9))
    with torch.no_grad():
        expected = ours(**pairs()).logits
        assert not torch.equal(again.eval()(**pairs()).logits, expected)
        again.load_adapter(adapter)
        assert torch.equal(again(**pairs()).logits, expected)


@pytest.mark.parametrize("config", [ALONE, ADDED], ids=["alone", "added"])
@pytest.mark.parametrize("name", TINY_SEQ2SEQ)
def test_logits_and_answers_are_those_of_the_side_model(name: str, config: SideConfig, tmp_path: Path):
    ours, plain = attached(name, tmp_path, config)
    for seed, padding in enumerate(("right", "left")):
        batch = pairs(seed, padding=padding)
        real = batch["labels"] != IGNORED
        with torch.no_grad():
            assert relative_error(plain(**batch).logits[real], ours(**batch).logits[real]) <= LOSS_TOLERANCE
        settings = GenerationSettings(max_new_tokens=NEW_TOKENS, stop_ids=frozenset())
        answers = ours.generate(batch["input_ids"], batch["attention_mask"], settings)
        assert torch.equal(generated(plain, batch)[:, 1:], answers)


@pytest.mark.parametrize("name", TINY_SEQ2SEQ)
def test_beams_and_samples_are_those_without_a_cache(name: str, tmp_path: Path):
    _, plain = attached(name, tmp_path, ADDED)
    batch = pairs(padding="left")
    for more in ({"num_beams": 3, "num_return_sequences": 2}, {"do_sample": True, "num_return_sequences": 2}):
        answers = [generated(plain, batch, use_cache=use_cache, **more) for use_cache in (True, False)]
        assert torch.equal(*answers)
        assert len(answers[0].unique(dim=0)) > len(batch["input_ids"])


def test_no_token_is_computed_twice(tmp_path: Path):
    ours, plain = attached("bart", tmp_path)
    seen: list[int] = []
    frozen = cast("LocalSeq2Seq", ours.source.blocks())._frozen
    for decoder in (frozen.decoder, ours.network.decoder.stack):
        decoder.register_forward_pre_hook(
            lambda _m, _a, kwargs: seen.append(kwargs["inputs_embeds"].shape[1]), with_kwargs=True
        )
    ours.generate(pairs()["input_ids"], settings=GenerationSettings(max_new_tokens=4, stop_ids=frozenset()))
    assert seen == [1] * 2 * 4
    seen.clear()
    plain.get_submodule("side_network").get_submodule("decoder.stack").register_forward_pre_hook(
        lambda _m, _a, kwargs: seen.append(kwargs["inputs_embeds"].shape[1]), with_kwargs=True
    )
    generated(plain, pairs())
    assert seen == [1] * NEW_TOKENS


@pytest.mark.parametrize("name", ["t5", "bart"])
def test_it_learns_as_the_side_model_does_and_nothing_else_learns(name: str, tmp_path: Path):
    ours, plain = attached(name, tmp_path, ADDED)
    plain.train()
    batch = pairs()
    for model in (ours, plain):
        model(**batch).loss.backward()
    theirs = dict(plain.named_parameters())
    expected = {name.replace("network.", "side_network.", 1): p.grad for name, p in ours.named_parameters()}
    assert {key for key, parameter in theirs.items() if parameter.grad is not None} == expected.keys()
    for key, grad in expected.items():
        torch.testing.assert_close(theirs[key].grad, grad, rtol=1e-3, atol=1e-5)


def test_what_another_encoder_gave_is_refused(tmp_path: Path):
    _, plain = attached("t5", tmp_path)
    foreign = BaseModelOutput(last_hidden_state=torch.zeros(3, 9, 32))
    with pytest.raises(ConfigError, match=r"The encoder's output beside a side network: expected 36 channels.* got 32"):
        plain(encoder_outputs=foreign, labels=pairs()["labels"])


def test_what_does_not_belong_together_is_refused(tmp_path: Path):
    attached("t5", tmp_path)
    with pytest.raises(CheckpointError, match=r"Adapter weights: expected the"):
        tidelock.attach_side(tiny_seq2seq("bart"), tmp_path)
    classifier = AutoModelForSequenceClassification.from_config(tiny_seq2seq("t5").config)
    with pytest.raises(CheckpointError, match=r"Adapter weights: expected the .* 4 missing \(head.dense.bias\)"):
        tidelock.attach_side(classifier, tmp_path)
