"""A side network beside an ordinary `transformers` model computes and generates as it does in tidelock."""

from __future__ import annotations

import inspect
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, DynamicCache, LlamaForCausalLM, PreTrainedModel

import tidelock
from tests.support.parity import LOSS_TOLERANCE, plain_model, relative_error, sequence_batch, token_batch
from tests.support.plain_side import randomise_side, side_model
from tests.support.tiny_models import ALL_MODELS, BLOCKS, TINY_MODELS, randomise
from tidelock.device.generate import GenerationSettings
from tidelock.device.side_model import SideModel
from tidelock.errors import CheckpointError, ConfigError
from tidelock.model.ends import empty_model
from tidelock.model.geometry import geometry_of
from tidelock.peft.adapter import AdapterConfig
from tidelock.peft.side import SideConfig
from tidelock.run.connect import connect

RANDOM = SideConfig(init="random", zero_upsample=False)
NEW_TOKENS = 8
# Transformers 5.24 renamed it.
CACHE = "cache" if "cache" in inspect.signature(LlamaForCausalLM.forward).parameters else "past_key_values"
# Sliding windows of both kinds, positions of every kind, an embedding of another width.
SOME = ["llama", "mistral", "gemma3_text", "qwen3", "opt_projected", "bloom", "gpt2"]


def attached(
    folder: Path, saved: Path, config: SideConfig = RANDOM, num_labels: int | None = None
) -> tuple[SideModel, PreTrainedModel]:
    """Return a side model in tidelock, and a plain model with what that one saved."""
    ours = side_model(folder, config, num_labels).eval()
    randomise_side(ours)
    ours.save_adapter(saved)
    plain = plain_model(folder, num_labels)
    tidelock.attach_side(plain, saved)
    return ours, plain


def generated(plain: Any, batch: Any, **settings: Any) -> Tensor:
    torch.manual_seed(3)
    ids: Tensor = plain.generate(
        input_ids=batch.input_ids,
        attention_mask=batch.attention_mask,
        max_new_tokens=NEW_TOKENS,
        pad_token_id=0,
        **{"do_sample": False, **settings},
    )
    return ids


@pytest.mark.parametrize("name", ALL_MODELS)
def test_logits_are_those_of_the_side_model(name: str, tiny_models: Path, tmp_path: Path):
    ours, plain = attached(tiny_models / name, tmp_path)
    for seed, padding in enumerate(("right", "left", "none")):
        batch = token_batch(padding, seed=seed)
        real = batch.attention_mask.bool()
        with torch.no_grad():
            expected = ours(batch.input_ids, batch.attention_mask).logits[real]
            logits = plain(batch.input_ids, attention_mask=batch.attention_mask).logits[real]
            assert relative_error(logits, expected) <= LOSS_TOLERANCE
            if padding == "left":  # the mask matters
                assert relative_error(plain(batch.input_ids).logits[real], expected) > LOSS_TOLERANCE


@pytest.mark.parametrize("name", ALL_MODELS)
def test_logits_of_one_text_are_those_of_the_side_model_bit_for_bit(name: str, tiny_models: Path, tmp_path: Path):
    ours, plain = attached(tiny_models / name, tmp_path)
    batch = token_batch("none", seed=2, lengths=(11,))
    with torch.no_grad():
        expected = ours(batch.input_ids, batch.attention_mask).logits
        assert torch.equal(plain(batch.input_ids, attention_mask=batch.attention_mask).logits, expected)
        assert torch.equal(plain(batch.input_ids, use_cache=False).logits, expected)


@pytest.mark.parametrize("name", ALL_MODELS)
def test_greedy_generation_is_that_of_the_side_model(name: str, tiny_models: Path, tmp_path: Path):
    ours, plain = attached(tiny_models / name, tmp_path)
    batch = token_batch("left", seed=9, lengths=(9, 5))
    settings = GenerationSettings(max_new_tokens=NEW_TOKENS)
    assert torch.equal(generated(plain, batch), ours.generate(batch.input_ids, batch.attention_mask, settings))


@pytest.mark.parametrize("name", ALL_MODELS)
def test_beams_are_those_without_a_cache(name: str, tiny_models: Path, tmp_path: Path):
    _, plain = attached(tiny_models / name, tmp_path)
    batch = token_batch("left", seed=9, lengths=(9, 5))
    beams = [generated(plain, batch, num_beams=3, use_cache=use_cache) for use_cache in (True, False)]
    assert torch.equal(*beams)
    if name not in {"opt_projected", "bloom_post_norm"}:  # these repeat one token whatever is done
        assert not torch.equal(beams[0], generated(plain, batch)), "the beams found nothing else than greedy search"


@pytest.mark.parametrize(
    "config",
    [
        SideConfig(init="random", zero_upsample=False, taps=(0, 2)),
        SideConfig(init="random", zero_upsample=False, taps=(1, 3), reduction=2),
        SideConfig(init="random", zero_upsample=False, output="alone"),
        SideConfig(init="random", zero_upsample=False, tap_width=5),
    ],
    ids=["sliding blocks only", "full blocks only", "alone", "narrow taps"],
)
@pytest.mark.parametrize("name", SOME)
def test_options_and_ways_to_generate(name: str, config: SideConfig, tiny_models: Path, tmp_path: Path):
    ours, plain = attached(tiny_models / name, tmp_path, config)
    batch = token_batch("left", seed=9, lengths=(9, 5))
    settings = GenerationSettings(max_new_tokens=NEW_TOKENS)
    assert torch.equal(generated(plain, batch), ours.generate(batch.input_ids, batch.attention_mask, settings))
    for more in ({"num_beams": 3, "num_return_sequences": 2}, {"do_sample": True, "num_return_sequences": 2}):
        answers = [generated(plain, batch, use_cache=use_cache, **more) for use_cache in (True, False)]
        assert torch.equal(*answers)
    row = token_batch("none", seed=9, lengths=(9,))
    assert torch.equal(generated(plain, row, prompt_lookup_num_tokens=3), generated(plain, row))


@pytest.mark.parametrize("name", TINY_MODELS)
def test_with_a_head_for_whole_texts(name: str, tiny_models: Path, tmp_path: Path):
    ours, plain = attached(tiny_models / name, tmp_path, num_labels=3)
    for padding in ("right", "left"):
        batch = sequence_batch(padding, 3)
        with torch.no_grad():
            expected = ours(**batch.arguments()).logits
            logits = plain(input_ids=batch.input_ids, attention_mask=batch.attention_mask).logits
        assert relative_error(logits, expected) <= LOSS_TOLERANCE


@pytest.mark.parametrize("num_labels", [None, 3])
@pytest.mark.parametrize("name", ["llama", "gpt2", "opt_projected"])
def test_it_learns_as_the_side_model_does_and_nothing_else_learns(
    name: str, num_labels: int | None, tiny_models: Path, tmp_path: Path
):
    ours, plain = attached(tiny_models / name, tmp_path, num_labels=num_labels)
    batch = token_batch("right") if num_labels is None else sequence_batch("right", 3)
    plain.train().enable_input_require_grads()  # as gradient checkpointing does
    graphs: list[bool] = []
    watched = geometry_of(empty_model(plain.config)).family
    for block in plain.get_submodule(f"{watched.decoder}.{watched.blocks}").children():
        block.register_forward_hook(
            lambda _m, _a, out: graphs.append((out[0] if isinstance(out, tuple) else out).requires_grad)
        )
    for model in (ours, plain):
        model(**batch.arguments()).loss.backward()
    theirs = dict(plain.named_parameters())
    trained = {name for name, parameter in theirs.items() if parameter.grad is not None}
    expected = {
        name.replace("network.", "side_network.", 1) if name.startswith("network.") else "score.weight": parameter.grad
        for name, parameter in ours.named_parameters()
    }
    assert trained == expected.keys()
    assert graphs == [False] * BLOCKS
    for key, grad in expected.items():
        assert grad is not None
        torch.testing.assert_close(theirs[key].grad, grad, rtol=1e-3, atol=1e-6)


def test_the_frozen_blocks_drop_nothing_out_though_the_model_trains(tmp_path: Path):
    settings = {**TINY_MODELS["gpt2"][1], "resid_pdrop": 0.5, "embd_pdrop": 0.5, "attn_pdrop": 0.5}
    whole = AutoModelForCausalLM.from_config(AutoConfig.for_model("gpt2", **settings))
    randomise(whole)
    whole.save_pretrained(tmp_path / "model")
    _, plain = attached(tmp_path / "model", tmp_path / "adapter", replace(RANDOM, dropout=0.5))
    batch = token_batch("right")
    plain.train()
    # The side network does drop out, which shows that the model did train.
    assert not torch.equal(plain(**batch.arguments()).loss, plain(**batch.arguments()).loss)
    plain.get_submodule("side_network").eval()
    assert torch.equal(plain(**batch.arguments()).loss, plain(**batch.arguments()).loss)


def test_one_token_at_a_time_with_a_cache_of_ones_own(tiny_models: Path, tmp_path: Path):
    _, plain = attached(tiny_models / "gemma3_text", tmp_path)
    ids = token_batch("none").input_ids
    with torch.no_grad():
        expected = plain(ids, use_cache=False).logits
        for cache in (DynamicCache(config=plain.config), DynamicCache()):
            steps = [plain(ids[:, :6], **{CACHE: cache}).logits]
            steps += [plain(ids[:, t : t + 1], **{CACHE: cache}).logits for t in range(6, ids.shape[1])]
            torch.testing.assert_close(torch.cat(steps, 1), expected, rtol=1e-4, atol=1e-4)


def test_embeddings_in_the_place_of_ids_and_tuples_in_that_of_outputs(tiny_models: Path, tmp_path: Path):
    _, plain = attached(tiny_models / "gemma2", tmp_path)
    ids = token_batch("none").input_ids
    with torch.no_grad():
        expected = plain(ids).logits
        embeddings = plain.get_input_embeddings()(ids)
        assert torch.equal(plain(inputs_embeds=embeddings, return_dict=False)[0], expected)


def test_it_moves_with_the_model_and_serves_one_of_another_dtype(tiny_models: Path, tmp_path: Path):
    ours, _ = attached(tiny_models / "llama", tmp_path)
    plain: Any = AutoModelForCausalLM.from_pretrained(tiny_models / "llama", dtype=torch.bfloat16)
    network = tidelock.attach_side(plain, tmp_path)
    assert plain.side_network is network
    assert {parameter.dtype for parameter in network.parameters()} == {torch.float32}
    ids = token_batch("none").input_ids
    with torch.no_grad():
        logits, expected = plain(ids).logits, ours(ids).logits
    assert logits.dtype == torch.bfloat16
    assert relative_error(logits.float(), expected) < 0.05
    plain.to("meta")
    assert all(parameter.is_meta for parameter in network.parameters())


def test_a_cache_that_it_cannot_use_is_refused(tiny_models: Path, tmp_path: Path):
    before = plain_model(tiny_models / "llama")
    ids = token_batch("none").input_ids
    filled = DynamicCache(config=before.config)
    with torch.no_grad():
        before(ids, **{CACHE: filled})
    _, plain = attached(tiny_models / "llama", tmp_path)
    with pytest.raises(ConfigError, match=r"A cache beside a side network: .* got one with 11 positions"):
        plain(ids[:, :1], **{CACHE: filled})
    with pytest.raises(ConfigError, match=r"A cache beside a side network: .* got StaticCache"):
        generated(plain, token_batch("left"), cache_implementation="static")


def test_what_does_not_belong_together_is_refused(tiny_models: Path, tmp_path: Path):
    _, plain = attached(tiny_models / "llama", tmp_path / "side")
    with pytest.raises(ConfigError, match=r"Attaching a side network: .* got one with it"):
        tidelock.attach_side(plain, tmp_path / "side")
    with pytest.raises(CheckpointError, match=r"Adapter weight"):
        tidelock.attach_side(plain_model(tiny_models / "gpt2"), tmp_path / "side")
    with pytest.raises(CheckpointError, match=r"1 missing \(head\.weight\)"):
        tidelock.attach_side(plain_model(tiny_models / "llama", 3), tmp_path / "side")
    attached(tiny_models / "llama", tmp_path / "three", num_labels=3)
    with pytest.raises(CheckpointError, match=r"1 unexpected \(head\.weight\)"):
        tidelock.attach_side(plain_model(tiny_models / "llama"), tmp_path / "three")
    with pytest.raises(CheckpointError, match=r"'head\.weight': expected floating-point numbers of shape \(2, "):
        tidelock.attach_side(plain_model(tiny_models / "llama", 2), tmp_path / "three")
    serial = connect("local", model=tiny_models / "llama", peft_config=AdapterConfig())
    serial.save_adapter(tmp_path / "serial")
    with pytest.raises(ConfigError, match=r"Attaching a side network: .* got an adapter of another method"):
        tidelock.attach_side(plain_model(tiny_models / "llama"), tmp_path / "serial")
    with pytest.raises(ConfigError, match=r"Attaching an adapter: .* got a side network .* tidelock\.attach_side"):
        tidelock.attach_adapter(plain_model(tiny_models / "llama"), tmp_path / "side")
