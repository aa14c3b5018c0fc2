"""A side network beside T5 or BART in a pool: any layout, over both stacks, gives what one process gives."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path
from typing import cast

import pytest
import torch
from transformers import Trainer, TrainingArguments

from tests.equivalence.test_pool import CONFIG
from tests.equivalence.test_pool_training import (
    COUNT,
    PER_EPOCH,
    RECIPE,
    Beside,
    assert_is_that_of_one_process,
    one_process,
    run_in_pool,
)
from tests.equivalence.test_side_part import gradients_of
from tests.support.plain_seq2seq import DECODER_BLOCKS, ENCODER_BLOCKS, TINY_SEQ2SEQ, tiny_seq2seq
from tests.support.plain_side import randomise_side
from tests.support.pool import all_of, in_pool
from tests.support.tiny_models import VOCAB
from tidelock.data.batch import Collator
from tidelock.device.side_model import SideModel
from tidelock.device.side_seq2seq import SideSeq2SeqModel
from tidelock.errors import ConfigError, ModelError
from tidelock.model.checkpoint import Checkpoint
from tidelock.model.ends import read_config
from tidelock.model.load import load_model
from tidelock.model.part_seq2seq import Seq2SeqPart
from tidelock.model.sizes import sizes_of
from tidelock.peft.side import SideConfig
from tidelock.peft.side_seq2seq_part import SideSeq2SeqPart
from tidelock.pool.example import Example
from tidelock.pool.held_out import HeldOut
from tidelock.pool.layout import PoolLayout, Stage
from tidelock.pool.peers import Peers
from tidelock.pool.pipeline import Pipeline
from tidelock.pool.redistribute import key_of
from tidelock.pool.seq2seq_stage import Seq2SeqStage
from tidelock.pool.side_stage import padded
from tidelock.run.connect_side import connect_side

SEAM, BLOCKS = ENCODER_BLOCKS, ENCODER_BLOCKS + DECODER_BLOCKS
LAYOUTS = {
    "alone": PoolLayout((Stage(range(BLOCKS), (0,), (1,)),), 2),
    "data parallel": PoolLayout((Stage(range(BLOCKS), (0, 1), (1, 1)),), 2),
    "uneven shares": PoolLayout((Stage(range(BLOCKS), (1, 0), (3, 1)),), 1),
    "cut in the encoder": PoolLayout((Stage(range(2), (0,), (1,), 2), Stage(range(2, BLOCKS), (1,), (1,))), 2),
    "cut at the seam": PoolLayout((Stage(range(SEAM), (1,), (1,), 2), Stage(range(SEAM, BLOCKS), (0,), (1,))), 3),
    "cut in the decoder": PoolLayout((Stage(range(5), (0,), (1,), 2), Stage(range(5, BLOCKS), (1,), (1,))), 2),
    "straight pipeline": PoolLayout(
        (
            Stage(range(1), (0,), (1,), 4),
            Stage(range(1, 3), (1,), (1,), 3),
            Stage(range(3, 5), (2,), (1,), 2),
            Stage(range(5, BLOCKS), (3,), (1,)),
        ),
        4,
    ),
    "hybrid": PoolLayout((Stage(range(3), (0, 2), (2, 1), 2), Stage(range(3, BLOCKS), (1,), (1,), 1)), 3),
    "hybrid, uneven groups": PoolLayout(
        (Stage(range(5), (2,), (1,), 2), Stage(range(5, BLOCKS), (0, 1, 3), (1, 2, 1), 1)), 2
    ),
    "one without blocks": PoolLayout((Stage(range(BLOCKS), (1,), (1,)),), 2, idle=(0,)),
}


@pytest.fixture(scope="session")
def seq2seq_models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the folder that holds every model of `TINY_SEQ2SEQ`, by name."""
    folder = tmp_path_factory.mktemp("seq2seq")
    for name in TINY_SEQ2SEQ:
        tiny_seq2seq(name).save_pretrained(folder / name)
    return folder


def pairs(name: str, count: int) -> list[Example]:
    """Return sources and targets of unlike lengths."""
    start = tiny_seq2seq(name).config.decoder_start_token_id
    found = []
    for seed in range(count):
        ids = torch.randint(3, VOCAB, (15,), generator=torch.Generator().manual_seed(seed)).tolist()
        source, target = ids[: 3 + seed * 5 % 7], ids[9 : 10 + seed * 2 % 5]
        found.append(Example(tuple(source), tuple(target), (start, *target[:-1])))
    return found


def model_of(folder: Path, config: SideConfig = CONFIG) -> SideSeq2SeqModel:
    """Return a side model over frozen stacks in this process."""
    found = connect_side("local", model=folder, task="text-to-text", side_config=config, start=False)
    return cast("SideSeq2SeqModel", found)


def beside(name: str) -> Beside:
    """Return what a run in a pool is of."""
    return Beside(model_of, lambda count: pairs(name, count))


def stages_of(folder: Path, cuts: tuple[int, ...], config: SideConfig = CONFIG) -> list[Seq2SeqStage]:
    checkpoint = Checkpoint.open(str(folder))
    return [Seq2SeqStage.load(checkpoint, config, range(first, end)) for first, end in pairwise(cuts)]


def join_parts(stages: list[Seq2SeqStage], values: list[dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    """Return what is of the whole network, out of what is each stage's; what is tied must be the same in all."""
    whole: dict[str, torch.Tensor] = {}
    for stage, own in zip(stages, values, strict=True):
        for name, value in own.items():
            if name in stage.slices:
                whole[name] = torch.cat([whole[name], value]) if name in whole else value
            else:
                assert name not in whole or (name in stage.tied and torch.equal(whole[name], value)), name
                whole[name] = value
    return whole


def assert_equal(folder: Path, layout: PoolLayout, batch: list[Example]) -> None:
    model = model_of(folder)
    randomise_side(model)
    expected = model(**padded(batch)).loss
    expected.backward()
    whole = model.network.state_dict()

    def work(peers: Peers) -> tuple[Seq2SeqStage, float, dict[str, torch.Tensor]]:
        number = layout.stage_of(peers.peer)
        assert number is not None
        stage = Seq2SeqStage.load(Checkpoint.open(str(folder)), CONFIG, layout.stages[number].blocks)
        stage.load_whole(whole)
        loss = Pipeline(peers, layout, number, stage).run(batch)
        return stage, loss, gradients_of(stage.trained())

    results = all_of(in_pool(layout.num_peers, work))
    for _, loss, _ in results:
        assert loss == pytest.approx(float(expected.detach()), rel=1e-5)
    for each in layout.stages:
        first, *others = (results[peer][2] for peer in each.peers)
        for other in others:
            assert all(torch.equal(first[name], other[name]) for name in first)
    leading = [results[each.peers[0]] for each in layout.stages]
    gradients = join_parts([stage for stage, _, _ in leading], [own for _, _, own in leading])
    assert gradients.keys() == dict(model.network.named_parameters()).keys()
    for name, parameter in model.network.named_parameters():
        torch.testing.assert_close(gradients[name], parameter.grad, rtol=1e-3, atol=1e-5, msg=name)


@pytest.mark.parametrize("layout", [name for name in LAYOUTS if name != "one without blocks"])
@pytest.mark.parametrize("name", ["t5", "bart"])
def test_every_layout_gives_the_gradients_of_one_process(name: str, layout: str, seq2seq_models: Path) -> None:
    assert_equal(seq2seq_models / name, LAYOUTS[layout], pairs(name, 7))


@pytest.mark.parametrize("name", TINY_SEQ2SEQ)
def test_every_family_does(name: str, seq2seq_models: Path) -> None:
    assert_equal(seq2seq_models / name, LAYOUTS["hybrid"], pairs(name, 4))


def test_fewer_examples_than_peers(seq2seq_models: Path) -> None:
    assert_equal(seq2seq_models / "t5", LAYOUTS["hybrid, uneven groups"], pairs("t5", 1))


@pytest.mark.parametrize("cuts", [(0, BLOCKS), (0, 2, BLOCKS), (0, SEAM, BLOCKS), (0, 1, 3, 5, BLOCKS)], ids=str)
@pytest.mark.parametrize("name", TINY_SEQ2SEQ)
def test_parts_start_as_the_network_does(name: str, cuts: tuple[int, ...], seq2seq_models: Path) -> None:
    config = SideConfig()
    model = model_of(seq2seq_models / name, config)
    before = {key: value.clone() for key, value in model.network.state_dict().items()}
    model.start(load_model(Checkpoint.open(str(seq2seq_models / name))))
    stages = stages_of(seq2seq_models / name, cuts, config)
    scores = torch.stack([stage.residual_scores() for stage in stages]).sum(0)
    for stage in stages:
        stage.load_whole(before)
        stage.start_from(scores)
    joined = join_parts(stages, [{**stage.trained()} for stage in stages])
    for key, parameter in model.network.named_parameters():
        assert torch.equal(joined[key], parameter), key
    assert not torch.equal(joined["decoder.taps.0.weight"], before["decoder.taps.0.weight"])


@pytest.mark.parametrize("name", ["t5", "bart"])
def test_a_part_holds_no_blocks_but_its_own(name: str, seq2seq_models: Path) -> None:
    whole = dict(load_model(Checkpoint.open(str(seq2seq_models / name))).named_parameters())
    per_block = {
        stack: sum(value.numel() for key, value in whole.items() if f"{stack}.{blocks}.1." in key)
        for stack in ("encoder", "decoder")
        for blocks in ("block" if name == "t5" else "layers",)
    }
    first, last = stages_of(seq2seq_models / name, (1, 3, 5))
    for stage in (first, last):  # frozen: nothing learns in it, and nothing drops out
        assert not any(parameter.requires_grad for parameter in stage.part.parameters())
        stacks = [stack for stack in (stage.part.encoder, stage.part.decoder) if stack is not None]
        assert not any(module.training for stack in stacks for module in stack.module.modules())
    around = [sum(p.numel() for p in stage.part.parameters()) for stage in (first, last)]
    around[0] -= 2 * per_block["encoder"]
    around[1] -= per_block["encoder"] + per_block["decoder"]
    # For each stack, T5: the table of relative positions and the last norm; BART: positions, the norm of embeddings.
    of_stack = 8 * 4 + 32 if name == "t5" else (64 + 2) * 32 + 2 * 32
    assert around == [of_stack, 2 * of_stack]


def test_what_a_part_cannot_be_is_refused(seq2seq_models: Path) -> None:
    folder = seq2seq_models / "t5"
    with pytest.raises(ModelError, match="expected blocks of 0 to 6, got 5 to 7"):
        Seq2SeqPart(Checkpoint.open(str(folder)), range(5, 8))
    config = read_config(folder)
    with pytest.raises(
        ConfigError, match=r"expected every block to be read, whole, got taps=\(1,\) and tap_width=None"
    ):
        SideSeq2SeqPart(SideConfig(taps=(1,)), config, sizes_of(config), range(2))


@pytest.mark.parametrize("name", ["t5", "bart"])
def test_an_example_has_the_key_that_the_model_asks_its_cache_for(name: str, seq2seq_models: Path) -> None:
    batch = pairs(name, 5)
    assert model_of(seq2seq_models / name).examples_of(padded(batch)) == [key_of(example) for example in batch]


QUICK = {("t5", "straight pipeline"), ("t5", "one without blocks"), ("bart", "cut at the seam"), ("bart", "hybrid")}


@pytest.mark.parametrize(
    ("name", "layout"),
    [
        pytest.param(name, layout, marks=[] if (name, layout) in QUICK else [pytest.mark.slow])
        for name in ("t5", "bart")
        for layout in LAYOUTS
    ],
)
def test_a_run_is_that_of_one_process(name: str, layout: str, seq2seq_models: Path, tmp_path: Path) -> None:
    folder, kind = seq2seq_models / name, beside(name)
    _, losses = one_process(folder, beside=kind)
    outcomes = run_in_pool(folder, LAYOUTS[layout], tmp_path, beside=kind)
    first = outcomes[0].state
    assert first is not None
    for outcome in outcomes:
        assert outcome.state is not None
        assert outcome.notes.losses == pytest.approx(losses, rel=1e-4)
        assert all(torch.equal(outcome.state[key], first[key]) for key in first)
        assert outcome.notes.filled == []
    assert_is_that_of_one_process(folder, first, kind)


def test_what_it_measures_is_what_one_process_does(seq2seq_models: Path, tmp_path: Path) -> None:
    folder, kind = seq2seq_models / "t5", beside("t5")
    held_out = HeldOut(pairs("t5", COUNT + 6)[COUNT:], RECIPE.batch_size, 2)
    rows = [
        {"input_ids": list(each.input_ids), "labels": list(cast("tuple[int, ...]", each.labels))}
        for each in held_out.examples
    ]
    arguments = TrainingArguments(str(tmp_path), per_device_eval_batch_size=RECIPE.batch_size, use_cpu=True)
    expected: dict[int, float] = {}

    def measure(step: int, model: SideModel | SideSeq2SeqModel) -> None:
        trainer = Trainer(model, arguments, data_collator=Collator(0), eval_dataset=rows)
        expected[step] = trainer.evaluate()["eval_loss"]

    one_process(folder, measure=measure, beside=kind)
    for outcome in run_in_pool(folder, LAYOUTS["hybrid"], tmp_path, held_out=held_out, beside=kind):
        due = {step: expected[step] for step in (2, 4, 6, 8, 9)}
        assert outcome.notes.evaluated_at == pytest.approx(due, rel=1e-4)


@pytest.mark.parametrize("steps", [2, 3, 8])  # in the first epoch, at its end, and in a later one
def test_a_run_goes_on_bit_for_bit(steps: int, seq2seq_models: Path, tmp_path: Path) -> None:
    folder, layout, kind = seq2seq_models / "t5", LAYOUTS["straight pipeline"], beside("t5")
    whole = run_in_pool(folder, layout, tmp_path, beside=kind)
    state, notes = whole[0].state, whole[0].notes
    assert state is not None
    for later in run_in_pool(folder, layout, tmp_path, notes.saved[steps], beside=kind):
        assert later.state is not None
        assert later.notes.losses == notes.losses[steps:]
        assert all(torch.equal(later.state[key], state[key]) for key in state)
        assert (later.notes.sent, later.notes.filled) == ([0], [])


# By how many are left; other cuts than those of the layouts that lose a peer.
AFTERWARDS = {
    1: PoolLayout((Stage(range(BLOCKS), (0,), (1,)),), 2),
    2: PoolLayout((Stage(range(6), (1,), (1,), 2), Stage(range(6, BLOCKS), (0,), (1,))), 2),
}


@pytest.mark.parametrize("dies_at", ["step 2", "redistributed", "step 7"])
@pytest.mark.parametrize("layout", [pytest.param("cut at the seam", marks=pytest.mark.slow), "hybrid"])
def test_the_others_go_on_without_a_lost_peer(layout: str, dies_at: str, seq2seq_models: Path, tmp_path: Path) -> None:
    folder, kind = seq2seq_models / "bart", beside("bart")
    left = run_in_pool(folder, LAYOUTS[layout], tmp_path, dies_at=dies_at, beside=kind)
    assert all(outcome.error is not None for outcome in left)
    for outcome in run_in_pool(folder, AFTERWARDS[len(left)], tmp_path, left[0].progress, beside=kind):
        assert outcome.state is not None
        assert outcome.notes.first + len(outcome.notes.losses) == RECIPE.epochs * PER_EPOCH
        assert_is_that_of_one_process(folder, outcome.state, kind)
