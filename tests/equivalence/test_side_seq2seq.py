"""The side method for T5 and BART: taps, loss, gradients, counts, and that the frozen model stays as it is."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import cast

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoConfig, Trainer, TrainingArguments

from tests.support.parity import GRADIENT_TOLERANCE, IGNORED, LOSS_TOLERANCE, relative_error
from tests.support.plain_seq2seq import (
    DECODER_BLOCKS,
    ENCODER_BLOCKS,
    TINY_SEQ2SEQ,
    PlainSideSeq2Seq,
    side_seq2seq,
    tiny_seq2seq,
)
from tests.support.plain_side import randomise_side
from tests.support.tiny_models import VOCAB
from tidelock.backbone.local_seq2seq import LocalSeq2Seq
from tidelock.device.causal_lm import packed_ids
from tidelock.device.generate import GenerationSettings
from tidelock.device.side_seq2seq import SideSeq2SeqModel
from tidelock.device.tap_source import TapSource
from tidelock.errors import ConfigError, ModelError, NonFiniteError
from tidelock.model.rows import Rows
from tidelock.model.seq2seq import FrozenSeq2Seq, Seq2SeqEnds
from tidelock.peft.side import SideConfig
from tidelock.peft.side_seq2seq import SideSeq2Seq

# PAC's T5: nothing of the backbone's last state is added.
ALONE = SideConfig(init="random", output="alone", zero_upsample=False)
PACS_BLOCKS = (1, 2, 3, 5, 6, 7, 9, 10, 11)


def pairs(seed: int = 0, *, padding: str = "right") -> dict[str, Tensor]:
    """Return sources of 9, 5 and 7 tokens with targets of 4, 6 and 1."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(3, VOCAB, (3, 9), generator=generator)
    mask = torch.zeros_like(ids)
    labels = torch.randint(3, VOCAB, (3, 6), generator=generator)
    for row, (source, target) in enumerate(((9, 4), (5, 6), (7, 1))):
        mask[row, slice(0, source) if padding == "right" else slice(9 - source, 9)] = 1
        labels[row, target:] = IGNORED
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}


@pytest.mark.parametrize("padding", ["right", "left"])
@pytest.mark.parametrize("name", TINY_SEQ2SEQ)
def test_taps_are_what_hooks_on_the_plain_model_see(name: str, padding: str):
    plain = tiny_seq2seq(name)
    frozen = FrozenSeq2Seq(tiny_seq2seq(name))
    ends = Seq2SeqEnds(tiny_seq2seq(name), Path("here"))
    family = frozen.family
    seen: list[Tensor] = []
    for path in (family.encoder, family.decoder):
        for block in cast("nn.ModuleList", plain.get_submodule(f"{path}.{family.blocks}")):
            block.register_forward_hook(lambda _m, _a, out: seen.append(out[0] if isinstance(out, tuple) else out))
    batch = pairs(padding=padding)
    logits = plain(**batch, use_cache=False).logits
    rows, targets = Rows.from_mask(batch["attention_mask"]), Rows.from_mask(batch["labels"] != IGNORED)
    encoded = frozen.encode(ends.embed(packed_ids(batch["input_ids"], rows)), rows, range(ENCODER_BLOCKS))
    decoder_ids = packed_ids(ends.decoder_ids(batch["labels"]), targets)
    source = (encoded.final_MD, rows)
    decoded = frozen.decode(ends.embed(decoder_ids), targets, source, range(DECODER_BLOCKS))
    assert len(seen) == ENCODER_BLOCKS + DECODER_BLOCKS
    for ours, theirs in zip(encoded.blocks, seen[:ENCODER_BLOCKS], strict=True):
        assert relative_error(ours, theirs[rows.mask().bool()]) <= LOSS_TOLERANCE
    for ours, theirs in zip(decoded.blocks, seen[ENCODER_BLOCKS:], strict=True):
        assert relative_error(ours, theirs[targets.mask().bool()]) <= LOSS_TOLERANCE
        assert not ours.requires_grad
    assert relative_error(ends.logits(decoded.final_MD), logits[targets.mask().bool()]) <= LOSS_TOLERANCE


@pytest.mark.parametrize(
    "config",
    [
        ALONE,
        SideConfig(init="random", zero_upsample=False, taps=(0, 2)),
        SideConfig(init="random", output="alone", zero_upsample=False, reduction=2, taps=(1,)),
    ],
    ids=["as PAC", "added, chosen taps", "half the width"],
)
@pytest.mark.parametrize("name", TINY_SEQ2SEQ)
def test_loss_and_gradients_are_those_of_the_whole_model_in_one_graph(name: str, config: SideConfig):
    whole = tiny_seq2seq(name)
    model = side_seq2seq(whole, config)
    randomise_side(model)
    plain = PlainSideSeq2Seq(whole, model)
    for seed, padding in enumerate(("right", "left")):
        batch = pairs(seed, padding=padding)
        model.zero_grad()
        plain.zero_grad()
        ours, theirs = model(**batch), plain(**batch)
        ours.loss.backward()
        theirs.loss.backward()
        torch.testing.assert_close(ours.loss, theirs.loss, rtol=LOSS_TOLERANCE, atol=0)
        real = batch["labels"] != IGNORED
        assert relative_error(ours.logits[real], theirs.logits[real]) <= LOSS_TOLERANCE
        assert not ours.logits[~real].any()
        theirs_by_name = dict(plain.named_parameters())
        assert theirs_by_name.keys() == dict(model.named_parameters()).keys()
        for key, parameter in model.named_parameters():
            expected = theirs_by_name[key].grad
            assert expected is not None, key
            assert parameter.grad is not None, key
            if float(expected.norm()) < 1e-7:  # a key's bias moves no softmax
                assert key.endswith("k_proj.bias"), key
            else:
                # Those of queries and keys are what is left of larger sums.
                size = max(float(expected.norm()), 3e-3)
                assert float((parameter.grad - expected).norm()) <= GRADIENT_TOLERANCE * size, key


@pytest.mark.parametrize("name", TINY_SEQ2SEQ)
def test_the_first_step_is_the_backbones_when_the_upsampling_is_zero(name: str):
    whole = tiny_seq2seq(name)
    batch = pairs()
    with torch.no_grad():
        ours, theirs = side_seq2seq(whole, SideConfig(init="random"))(**batch).loss, whole(**batch).loss
    torch.testing.assert_close(ours, theirs, rtol=LOSS_TOLERANCE, atol=0)


@pytest.mark.parametrize(
    ("shape", "taps", "expected"),
    [
        # PAC's T5-Base and T5-Large: 3.88 M, 5.10 M, 6.89 M and 17.7 M.
        ({"d_model": 768, "d_ff": 3072, "num_layers": 12, "num_heads": 12}, PACS_BLOCKS, 3_878_706),
        ({"d_model": 768, "d_ff": 3072, "num_layers": 12, "num_heads": 12}, None, 5_097_240),
        ({"d_model": 1024, "d_ff": 4096, "num_layers": 24, "num_heads": 16}, PACS_BLOCKS, 6_891_922),
        ({"d_model": 1024, "d_ff": 4096, "num_layers": 24, "num_heads": 16}, None, 17_718_832),
    ],
)
def test_trained_parameters_are_as_many_as_pacs(shape: dict[str, int], taps: tuple[int, ...] | None, expected: int):
    config = AutoConfig.for_model("t5", d_kv=64, **shape)
    hidden, heads, blocks = shape["d_model"], shape["num_heads"], shape["num_layers"]
    width, feed_forward = hidden // 8, shape["d_ff"] // 8
    encoder_block = 4 * width**2 + 2 * width * feed_forward + 2 * width
    decoder_block = 8 * width**2 + 2 * width * feed_forward + 3 * width
    read, buckets = hidden * width + width, 32 * heads
    layers = blocks if taps is None else len(taps)
    by_formula = layers * (encoder_block + decoder_block + 2 * read + 2)  # each tap with its linear and its gate
    by_formula += 2 * (read + width + buckets) + width * hidden + hidden
    side = SideConfig(init="random", output="alone", zero_upsample=False, taps=taps)
    network = SideSeq2Seq(side, config, (blocks, blocks))
    assert sum(parameter.numel() for parameter in network.parameters()) == by_formula == expected


@pytest.mark.parametrize("name", ["t5", "bart"])
@pytest.mark.parametrize("init", ["magnitude", "fisher"])
def test_at_the_full_width_a_started_network_is_the_backbone(name: str, init: str):
    whole = tiny_seq2seq(name)
    config = SideConfig(init=init, output="alone", zero_upsample=False, reduction=1)  # type: ignore[arg-type]
    model = side_seq2seq(whole, config)
    batch = pairs()
    examples = [{key: value[row : row + 1] for key, value in batch.items()} for row in range(2)]
    model.start(whole, examples)
    with torch.no_grad():
        for stack in (model.network.encoder, model.network.decoder):
            stack.gates.fill_(10.0)  # only the side state counts
        model.network.head.up.weight.copy_(torch.eye(32))
        model.network.head.up.bias.zero_()
        torch.testing.assert_close(model(**batch).loss, whole(**batch).loss, rtol=1e-5, atol=0)


@pytest.mark.parametrize("name", TINY_SEQ2SEQ)
def test_every_side_weight_is_a_part_of_the_backbones_and_t5s_positions_are_those_of_its_first_block(name: str):
    whole = tiny_seq2seq(name)
    model = side_seq2seq(whole, SideConfig(output="alone", zero_upsample=False, taps=(1, 2)))
    model.start(whole)
    family = model.network.family
    for path, side in ((family.encoder, model.network.encoder), (family.decoder, model.network.decoder)):
        stack = whole.get_submodule(path)
        everything = torch.cat([parameter.flatten() for parameter in stack.parameters()])
        for key, parameter in side.stack.named_parameters():
            assert bool(torch.isin(parameter, everything).all()), key
            if "relative_attention_bias" in key:
                assert torch.equal(parameter, stack.get_parameter(key)), key


def test_the_frozen_model_gets_no_gradient_does_not_change_and_drops_nothing_out():
    whole = tiny_seq2seq("bart", dropout=0.5)
    frozen, config = FrozenSeq2Seq(whole), replace(ALONE, dropout=0.5)
    model = SideSeq2SeqModel(Seq2SeqEnds(whole, Path("here")), TapSource(lambda: LocalSeq2Seq(frozen)), config).train()
    before = {key: value.clone() for key, value in whole.state_dict().items()}
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    for _ in range(2):
        model(**pairs()).loss.backward()
        optimizer.step()
    assert all(torch.equal(value, before[key]) for key, value in whole.state_dict().items())
    assert all(parameter.grad is None for parameter in whole.parameters())
    rows, x = Rows((0,), (3,), 3), torch.randn(3, 32)
    first, second = (frozen.encode(x, rows, (0, 1)) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first.blocks, second.blocks, strict=True))
    assert not torch.equal(model(**pairs()).loss, model(**pairs()).loss)
    model.eval()
    assert torch.equal(model(**pairs()).loss, model(**pairs()).loss)


@pytest.mark.parametrize("name", TINY_SEQ2SEQ)
def test_greedy_generation_predicts_what_teacher_forcing_predicts(name: str):
    model = side_seq2seq(tiny_seq2seq(name), ALONE).eval()
    randomise_side(model)
    batch = pairs(padding="left")
    settings = GenerationSettings(max_new_tokens=6, stop_ids=frozenset())
    answers = model.generate(batch["input_ids"], batch["attention_mask"], settings)
    assert answers.shape == (3, 6)
    forced = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], labels=answers).logits
    assert torch.equal(forced.argmax(2), answers)
    stop = int(answers[0, 2])
    settings = GenerationSettings(max_new_tokens=6, stop_ids=frozenset([stop]))
    stopped = model.generate(batch["input_ids"][:1], batch["attention_mask"][:1], settings)
    assert stopped[0].tolist() == answers[0, : answers[0].tolist().index(stop) + 1].tolist()


def test_the_ends_do_not_keep_the_blocks_alive():
    whole = tiny_seq2seq("bart")
    ends = Seq2SeqEnds(whole, Path("here"))
    held = {id(parameter) for parameter in ends._head_model.parameters()}
    assert held == {id(whole.get_input_embeddings().weight)}


@pytest.mark.parametrize("name", ["t5", "bart"])
def test_trainer_trains_it_and_the_loss_falls(name: str, tmp_path):
    whole = tiny_seq2seq(name)
    model = side_seq2seq(whole, SideConfig(output="alone", zero_upsample=False, reduction=2))
    model.start(whole)
    batch = pairs()
    rows = [{key: value[row] for key, value in batch.items()} for row in range(3)]
    before = float(model(**batch).loss.detach())
    arguments = TrainingArguments(
        output_dir=str(tmp_path),
        max_steps=60,
        per_device_train_batch_size=3,
        learning_rate=2e-2,
        report_to=[],
        save_strategy="no",
        use_cpu=True,
    )
    Trainer(model, arguments, train_dataset=rows).train()
    assert float(model.eval()(**batch).loss.detach()) < 0.5 * before


def test_the_loss_is_divided_by_the_number_of_items():
    model = side_seq2seq(tiny_seq2seq("t5"), ALONE)
    batch = pairs()
    torch.testing.assert_close(model(**batch, num_items_in_batch=22).loss * 2, model(**batch).loss)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"labels": None}, r"Labels: expected target ids of two axes, 3 rows like the sources', got none"),
        ({"labels": torch.ones(3, dtype=torch.long)}, r"Labels: .* got shape \(3,\)"),
        ({"labels": torch.ones(2, 4, dtype=torch.long)}, r"Labels: .* got shape \(2, 4\)"),
        ({"labels": torch.tensor([[5, 6], [IGNORED, 6], [5, 6]])}, r"Labels: .* \(row 1\)"),
        ({"labels": torch.tensor([[5, 6], [5, 6], [IGNORED, IGNORED]])}, r"Labels: .* \(row 2\)"),
        ({"decoder_input_ids": torch.ones(3, 2)}, r"got the arguments \['decoder_input_ids'\]"),
        ({"input_ids": torch.ones(3, 70, dtype=torch.long), "attention_mask": None}, r"at most 64 tokens a row"),
    ],
)
def test_what_cannot_be_honoured_is_refused(change: dict[str, Tensor | None], message: str):
    model = side_seq2seq(tiny_seq2seq("bart"), ALONE)
    with pytest.raises(ConfigError, match=message):
        model(**{**pairs(), **change})


def test_a_loss_that_is_no_number_is_refused():
    model = side_seq2seq(tiny_seq2seq("t5"), ALONE)
    with torch.no_grad():
        model.network.head.up.bias.fill_(float("nan"))
    with pytest.raises(NonFiniteError, match="Loss: expected a finite number, got nan"):
        model(**pairs())


def test_an_encoder_decoder_of_another_family_is_refused():
    config = AutoConfig.for_model("pegasus", d_model=32, encoder_layers=1, decoder_layers=1)
    with pytest.raises(
        ModelError, match=r"type 'pegasus': expected a decoder or one of the encoder-decoders bart, t5, got"
    ):
        SideSeq2Seq(ALONE, config, (1, 1))
