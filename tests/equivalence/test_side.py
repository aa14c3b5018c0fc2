"""The side method: taps are what hooks on the plain model see, and gradients those of the whole model in one graph."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import cast

import pytest
import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel, Trainer, TrainingArguments

from tests.support.parity import (
    GRADIENT_TOLERANCE,
    IGNORED,
    LOSS_TOLERANCE,
    TokenBatch,
    plain_model,
    relative_error,
    sequence_batch,
    token_batch,
)
from tests.support.plain_side import PlainSide, randomise_side, side_model
from tests.support.tiny_models import ALL_MODELS, BLOCKS, TINY_MODELS, randomise
from tidelock.backbone.local import LocalBackbone
from tidelock.device.causal_lm import packed_ids
from tidelock.device.generate import GenerationSettings
from tidelock.device.side_model import SideModel
from tidelock.errors import ConfigError
from tidelock.model.cut import CutModel
from tidelock.model.rows import Rows
from tidelock.model.taps import TapPass, Taps
from tidelock.model.walk import Batch
from tidelock.peft.side import SideConfig

PADDINGS = ("right", "left", "none")
RANDOM = SideConfig(init="random", zero_upsample=False)


def read_taps(cut: CutModel, batch: TokenBatch, blocks: tuple[int, ...], plain: PreTrainedModel) -> tuple[Taps, Rows]:
    rows = Rows.from_mask(batch.attention_mask)
    with torch.no_grad():
        embeddings = plain.get_input_embeddings()(packed_ids(batch.input_ids, rows))
    whole = Batch(embeddings, rows, torch.arange(rows.num_tokens), active={}, training=False)
    return TapPass(cut, whole, blocks).forward(), rows


@pytest.mark.parametrize("name", ALL_MODELS)
def test_taps_are_what_hooks_on_the_plain_model_see(name: str, tiny_models: Path):
    plain = plain_model(tiny_models / name)
    cut = CutModel(AutoModelForCausalLM.from_pretrained(tiny_models / name, dtype=torch.float32))
    family = cut.geometry.family
    seen: list[torch.Tensor] = []
    for block in cast("nn.ModuleList", plain.get_submodule(f"{family.decoder}.{family.blocks}")):
        block.register_forward_hook(lambda _m, _a, out: seen.append(out[0] if isinstance(out, tuple) else out))
    plain.get_output_embeddings().register_forward_pre_hook(lambda _m, args: seen.append(args[0]))
    for seed, padding in enumerate(PADDINGS):
        batch = token_batch(padding, seed=seed)
        seen.clear()
        plain(input_ids=batch.input_ids, attention_mask=batch.attention_mask, use_cache=False)
        taps, rows = read_taps(cut, batch, tuple(range(BLOCKS)), plain)
        real = rows.mask().bool()
        assert len(taps.blocks) == BLOCKS
        for ours, theirs in zip((*taps.blocks, taps.final_MD), seen, strict=True):
            torch.testing.assert_close(ours, theirs[real], rtol=1e-5, atol=1e-5)
            assert not ours.requires_grad


@pytest.mark.parametrize("name", ALL_MODELS)
def test_loss_and_gradients_are_those_of_the_whole_model_in_one_graph(name: str, tiny_models: Path):
    model = side_model(tiny_models / name, RANDOM)
    randomise_side(model)
    plain = PlainSide(tiny_models / name, model)
    for seed, padding in enumerate(PADDINGS):
        assert_same_pass(model, plain, token_batch(padding, seed=seed))


@pytest.mark.parametrize(
    "config",
    [
        SideConfig(init="random", zero_upsample=False, taps=(1, 3)),
        SideConfig(init="random", zero_upsample=False, reduction=2, taps=(0,)),
        SideConfig(init="random", zero_upsample=False, output="alone"),
        SideConfig(init="random", zero_upsample=False, tap_width=5, taps=(0, 2, 3)),
    ],
    ids=["chosen taps", "half the width", "alone", "narrow taps"],
)
@pytest.mark.parametrize("name", ["llama", "gemma3_text", "smollm3", "gpt2"])
def test_options_too(name: str, config: SideConfig, tiny_models: Path):
    model = side_model(tiny_models / name, config)
    randomise_side(model)
    assert_same_pass(model, PlainSide(tiny_models / name, model), token_batch("right"))


@pytest.mark.parametrize("num_labels", [1, 3], ids=["regression", "classification"])
@pytest.mark.parametrize("name", ALL_MODELS)
def test_with_a_head_for_whole_texts_too(name: str, num_labels: int, tiny_models: Path):
    torch.manual_seed(0)  # the head begins by the global generator
    model = side_model(tiny_models / name, RANDOM, num_labels)
    randomise_side(model)
    plain = PlainSide(tiny_models / name, model)
    for seed, padding in enumerate(PADDINGS):
        assert_same_pass(model, plain, sequence_batch(padding, num_labels, seed=seed))


def assert_same_pass(model: SideModel, plain: PlainSide, batch: TokenBatch) -> None:
    model.zero_grad()
    plain.zero_grad()
    ours, theirs = model(**batch.arguments()), plain(batch)
    ours.loss.backward()
    theirs.loss.backward()
    torch.testing.assert_close(ours.loss, theirs.loss, rtol=LOSS_TOLERANCE, atol=0)
    predicts = torch.ones_like(batch.labels, dtype=torch.bool)
    if model.head is None:
        predicts = (batch.labels != IGNORED).roll(-1, 1)
    assert relative_error(ours.logits[predicts], theirs.logits[predicts]) <= LOSS_TOLERANCE
    theirs_by_name = dict(plain.named_parameters())
    assert theirs_by_name.keys() == dict(model.named_parameters()).keys()
    for name, parameter in model.named_parameters():
        expected = theirs_by_name[name].grad
        assert expected is not None, name
        assert parameter.grad is not None, name
        if float(expected.norm()) < 5e-7:  # a key's bias moves no softmax; what is left is rounding
            assert name.endswith(("k_proj.bias", "query_key_value.bias", "c_attn.bias")), name
            assert float(parameter.grad.norm()) < 1e-6, name
        else:
            size = max(float(expected.norm()), 1e-2 if parameter.ndim == 0 else 0.0)  # a gate's is a sum that cancels
            assert float((parameter.grad - expected).norm()) <= GRADIENT_TOLERANCE * size, name


@pytest.mark.parametrize("name", TINY_MODELS)
def test_the_first_step_is_the_backbones_when_the_upsampling_is_zero(name: str, tiny_models: Path):
    model, plain = side_model(tiny_models / name, SideConfig(init="random")), plain_model(tiny_models / name)
    batch = token_batch("right")
    ids, rows = batch.input_ids, Rows.from_mask(batch.attention_mask)
    with torch.no_grad():
        expected = plain(**batch.arguments()).loss
        torch.testing.assert_close(model(**batch.arguments()).loss, expected, rtol=LOSS_TOLERANCE, atol=0)
        final = model.final_states(ids, rows, torch.arange(rows.num_tokens))
        whole = Batch(model.ends.embed(packed_ids(ids, rows)), rows, torch.arange(rows.num_tokens), {}, training=False)
        assert torch.equal(final, model._read(packed_ids(ids, rows), whole).final_MD)
    model(**batch.arguments()).loss.backward()
    assert model.network.head.up.weight.grad is not None
    assert float(model.network.head.up.weight.grad.norm()) > 0


@pytest.mark.parametrize("name", ["llama_tied", "gpt2", "opt_projected"])
def test_the_backbone_gets_no_gradient_and_does_not_change(name: str, tiny_models: Path):
    model = side_model(tiny_models / name, RANDOM)
    model(**token_batch("right").arguments())
    assert isinstance(model.source._blocks, LocalBackbone)
    cut = model.source._blocks._cut
    frozen = [*cut.parameters(), *model.ends._head_model.parameters(), *model.ends._embedding.parameters()]
    before = [parameter.clone() for parameter in frozen]
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    start = {name: parameter.clone() for name, parameter in model.named_parameters()}
    for _ in range(2):
        model(**token_batch("right").arguments()).loss.backward()
        optimizer.step()
    assert all(parameter.grad is None and not parameter.requires_grad for parameter in frozen)
    assert all(torch.equal(old, new) for old, new in zip(before, frozen, strict=True))
    assert not any(torch.equal(start[name], parameter) for name, parameter in model.named_parameters())
    assert not {id(p) for p in model.parameters()} & {id(p) for p in frozen}


def test_the_backbone_is_in_eval_mode_though_the_model_trains(tmp_path: Path):
    settings = {**TINY_MODELS["gpt2"][1], "resid_pdrop": 0.5, "embd_pdrop": 0.5, "attn_pdrop": 0.5}
    whole = AutoModelForCausalLM.from_config(AutoConfig.for_model("gpt2", **settings))
    randomise(whole)
    whole.save_pretrained(tmp_path)
    model = side_model(tmp_path, replace(RANDOM, dropout=0.5)).train()
    batch = token_batch("right")
    rows = Rows.from_mask(batch.attention_mask)
    ids = packed_ids(batch.input_ids, rows)
    asked = Batch(model.ends.embed(ids), rows, torch.arange(3), active={}, training=False)
    first, second = (model._read(ids, asked) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first.blocks, second.blocks, strict=True))
    # The side network does drop out, which shows that the model did train.
    assert not torch.equal(model(**batch.arguments()).loss, model(**batch.arguments()).loss)
    model.eval()
    assert torch.equal(model(**batch.arguments()).loss, model(**batch.arguments()).loss)


@pytest.mark.parametrize("name", ALL_MODELS)
def test_greedy_generation_equals_recomputing_everything(name: str, tiny_models: Path):
    model = side_model(tiny_models / name, RANDOM).eval()
    randomise_side(model)
    prompts = token_batch("left", seed=9, lengths=(9, 5))
    with_cache = model.generate(prompts.input_ids, prompts.attention_mask, GenerationSettings(max_new_tokens=10))
    for row, length in enumerate((9, 5)):
        ids = prompts.input_ids[row : row + 1, 9 - length :]
        for _ in range(10):
            ids = torch.cat([ids, model(ids).logits[:, -1:].argmax(2)], 1)
        assert with_cache[row, 9 - length :].tolist() == ids[0].tolist()


def test_trained_parameters_are_counted_by_a_formula(tiny_models: Path):
    model = side_model(tiny_models / "llama", SideConfig(init="random"))
    width, heads, kv_heads, head, feed_forward, hidden = 4, 4, 2, 2, 6, 32
    block = 2 * width * heads * head + 2 * width * kv_heads * head + 3 * width * feed_forward + 2 * width
    read = hidden * width + width
    expected = BLOCKS * (block + read + 1) + read + width + (width * hidden + hidden) + 1
    assert sum(parameter.numel() for parameter in model.parameters()) == expected
    assert sum(value.numel() for value in model.state_dict().values()) == expected


def test_trainer_trains_it_and_the_loss_falls(tiny_models: Path, tmp_path: Path):
    model = side_model(tiny_models / "llama", SideConfig(init="random", reduction=2))
    batch = token_batch("right", lengths=(11, 7, 9, 10))
    rows = [{name: tensor[row] for name, tensor in batch.arguments().items()} for row in range(4)]
    before = float(model(**batch.arguments()).loss.detach())
    arguments = TrainingArguments(
        output_dir=str(tmp_path),
        max_steps=60,
        per_device_train_batch_size=2,
        gradient_accumulation_steps=2,
        learning_rate=1e-2,
        report_to=[],
        logging_steps=60,
        save_strategy="steps",
        save_steps=60,
        use_cpu=True,
    )
    trainer = Trainer(model, arguments, train_dataset=rows)
    trainer.train()
    after = float(model(**batch.arguments()).loss.detach())
    assert after < 0.7 * before
    resumed = side_model(tiny_models / "llama", SideConfig(init="random", reduction=2))
    resumed.load_state_dict(model.state_dict())
    assert torch.equal(resumed.eval()(**batch.arguments()).loss, model.eval()(**batch.arguments()).loss)


def test_blocks_that_the_model_does_not_have_are_refused(tiny_models: Path):
    with pytest.raises(ConfigError, match=r"SideConfig.taps: expected blocks 0 to 3, as the model has, got 4"):
        side_model(tiny_models / "llama", SideConfig(taps=(0, 4)))
