"""What is measured of a device: its bytes by hand, and that it is measured once."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from peft import LoraConfig

from tests.equivalence.test_pool import examples
from tests.support.plain_seq2seq import DECODER_BLOCKS, ENCODER_BLOCKS, tiny_seq2seq
from tests.support.pool import all_of, in_pool
from tests.support.tiny_models import BLOCKS, VOCAB, save_tiny_model
from tidelock.errors import PeerError
from tidelock.model.checkpoint import Checkpoint
from tidelock.model.ends import Ends, read_config
from tidelock.model.geometry import Place, SiteId
from tidelock.model.part import ModelPart
from tidelock.peft.side import SideConfig
from tidelock.pool import profiler
from tidelock.pool.example import Example
from tidelock.pool.job import PoolJob
from tidelock.pool.profiler import DeviceFacts, measure_device, measure_pool
from tidelock.pool.recipe import Progress, Recipe

ROWS = (1, 3)
DEVICE = DeviceFacts("box", 1000, "this machine")


@pytest.fixture
def job(tmp_path):
    source = Checkpoint.open(str(save_tiny_model("llama", tmp_path / "model")))
    return PoolJob(
        "llama", source, SideConfig(init="random"), Progress(0, {}, {}), examples(5), Recipe(), 1, NotImplemented
    )


@pytest.fixture(autouse=True)
def _own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("TIDELOCK_CACHE", str(tmp_path / "cache"))


def test_bytes_by_hand(job):
    found = measure_device(job, ROWS)
    assert len(found.blocks) == BLOCKS
    config = read_config(job.source.folder)
    ends = Ends(config, job.source)
    first, middle, *_, last = found.blocks
    side = 4  # a hidden width of 32 by 8
    per_block = middle.gradient_bytes
    assert first.gradient_bytes == per_block + 4 * (32 * side + side)  # the side network's own start
    frozen = sum(p.numel() for p in ModelPart(job.source, range(1, 2)).cut.parameters())
    assert middle.parameter_bytes == 4 * frozen + per_block
    held = ends.embedding.numel() + ends.head.weight.numel()  # not tied
    assert first.parameter_bytes == 4 * (frozen + held) + first.gradient_bytes
    lengths = sorted(len(example.input_ids) for example in job.examples)[1:4]
    assert middle.forward_bytes_per_row == int(4 * sum(lengths) / 3 * (32 + side))
    assert middle.backward_bytes_per_row == int(4 * sum(lengths) / 3 * side)
    for block in found.blocks:
        assert block.optimizer_bytes == 2 * block.gradient_bytes
        # At least the tap, which the gradient of its linear needs; and no weight is taken for something kept.
        assert 4 * sum(lengths) / 3 * 32 <= block.kept_bytes_per_row < 4 * ends.embedding.numel()
    assert last.kept_bytes_per_row > middle.kept_bytes_per_row
    for table in (found.device.forward_seconds, found.device.backward_seconds):
        assert [len(seconds) for seconds in table] == [BLOCKS, BLOCKS]
        assert all(second > 0 for seconds in table for second in seconds)


@pytest.mark.parametrize("config", [SideConfig(init="random"), LoraConfig(r=2, target_modules=["*"])])
def test_a_head_for_whole_texts_takes_the_place_of_the_models_own(job, config):
    job, ends = replace(job, config=config), Ends(read_config(job.source.folder), job.source)
    whole = measure_device(job, ROWS).blocks[-1]
    texts = replace(job, num_labels=3, examples=[replace(example, labels=1) for example in job.examples])
    found = measure_device(texts, ROWS).blocks[-1]
    head = 4 * 3 * 32
    assert found.gradient_bytes == whole.gradient_bytes + head
    held = 4 * (ends.embedding.numel() + ends.head.weight.numel())
    assert found.parameter_bytes == whole.parameter_bytes - held + head


@pytest.mark.parametrize("layers", [None, [2]])
def test_where_gradients_go_through_the_blocks(job, layers):
    job = replace(job, config=LoraConfig(r=2, target_modules=["*"], layers_to_transform=layers), kept=None)
    found = measure_device(job, ROWS)
    config = read_config(job.source.folder)
    ends = Ends(config, job.source)
    lengths = sorted(len(example.input_ids) for example in job.examples)[1:4]
    wide = int(4 * sum(lengths) / 3 * 32)
    learning = range(BLOCKS) if layers is None else layers
    for number, block in enumerate(found.blocks):
        sites = ends.geometry.sites[SiteId(number, Place.ATTN)]
        weights = sum(4 * 2 * (sites.width + projection.width) for projection in sites.projections)
        assert block.gradient_bytes == (weights if number in learning else 0)
        assert block.optimizer_bytes == 2 * block.gradient_bytes
        assert block.forward_bytes_per_row == wide
        assert block.backward_bytes_per_row == (wide if number >= min(learning) else 0)
        # Where no gradient comes nothing is kept; where one does, that is more than what came in.
        assert block.kept_bytes_per_row == 0 if number < min(learning) else block.kept_bytes_per_row > 2 * wide


@pytest.mark.parametrize("name", ["t5", "bart"])
def test_an_encoder_decoders_bytes_by_hand(name, tmp_path):
    tiny_seq2seq(name).save_pretrained(tmp_path / "model")
    source = Checkpoint.open(str(tmp_path / "model"))
    rows = [Example((5,) * length, (6,) * (length - 1), (7,) * (length - 1)) for length in (3, 4, 8)]
    job = PoolJob(name, source, SideConfig(init="random"), Progress(0, {}, {}), rows, Recipe(), 1, NotImplemented)
    found = measure_device(job, ROWS)
    encoder, decoder = found.blocks[:ENCODER_BLOCKS], found.blocks[ENCODER_BLOCKS:]
    assert len(decoder) == DECODER_BLOCKS
    side = {"t5": 4, "bart": 8}[name]  # a hidden width of 32 by 8; BART's heads share it and have no less than 2
    for block in encoder:  # 5 tokens of a source in the mean, the last one's final state as wide
        assert (block.forward_bytes_per_row, block.backward_bytes_per_row) == (4 * 5 * (32 + side), 4 * 5 * side)
    for block in decoder:  # and 4 of a target
        assert (block.forward_bytes_per_row, block.backward_bytes_per_row) == (4 * 9 * (32 + side), 4 * 9 * side)
    # Attention and the two linears after it; in the decoder keys and values of the source too.
    inner = {"t5": (48, 48), "bart": (48, 40)}[name]
    extra = {"t5": 8, "bart": 0}[name]  # the table of relative positions
    assert encoder[1].working_bytes_per_row == 4 * 5 * (5 * 32 + inner[0] + extra)
    assert decoder[1].working_bytes_per_row == 4 * (4 * (7 * 32 + inner[1] + extra) + 5 * 2 * 32)
    embedding = 4 * VOCAB * 32
    held = [block.parameter_bytes - block.gradient_bytes for block in found.blocks]
    assert held[0] - held[1] == held[ENCODER_BLOCKS] - held[ENCODER_BLOCKS + 1] == embedding  # and head, which is tied
    assert held[-1] == held[ENCODER_BLOCKS]
    assert decoder[1].gradient_bytes > encoder[1].gradient_bytes
    assert decoder[2].kept_bytes_per_row > decoder[1].kept_bytes_per_row > encoder[1].kept_bytes_per_row
    for table in (found.device.forward_seconds, found.device.backward_seconds):
        assert all(len(seconds) == len(found.blocks) and min(seconds) > 0 for seconds in table)


def test_a_device_is_measured_once(job, tmp_path, monkeypatch):
    calls = []

    def counted(*args):
        calls.append(args)
        return measure_device(*args)

    monkeypatch.setattr(profiler, "measure_device", counted)

    def profile(some_job, device):
        return all_of(in_pool(2, lambda peers: measure_pool(peers, some_job, ROWS, device)))

    first = profile(job, DEVICE)
    assert first[0] == first[1]
    assert [device.name for device in first[0].devices] == ["0: box", "1: box"]
    assert [device.memory_bytes for device in first[0].devices] == [1000, 1000]
    assert first[0].links.between[0].bytes_per_second > 0
    assert len(calls) == 1
    again = profile(job, replace(DEVICE, name="the same box", memory_bytes=5))
    assert len(calls) == 1
    assert again[0].devices[0].forward_seconds == first[0].devices[0].forward_seconds
    assert again[0].devices[0].memory_bytes == 5
    profile(job, replace(DEVICE, key="another machine"))
    profile(replace(job, config=SideConfig(init="random", reduction=4)), DEVICE)
    assert len(calls) == 3
    lora = replace(job, config=LoraConfig(r=2, target_modules=["q_proj", "v_proj"]))
    profile(lora, DEVICE)
    profile(lora, DEVICE)
    assert len(calls) == 4
    profile(replace(lora, num_labels=2, examples=[replace(example, labels=1) for example in job.examples]), DEVICE)
    assert len(calls) == 5
    for kept in (tmp_path / "cache" / "profiles").glob("*.json"):
        kept.write_text("{")
    profile(job, DEVICE)
    assert len(calls) == 6


def test_what_is_not_kept_is_said(job, tmp_path):
    (tmp_path / "cache").write_text("no folder")
    (error,) = in_pool(1, lambda peers: measure_pool(peers, job, ROWS, DEVICE))
    assert "expected the disk to take it, got Not a directory" in str(error)


def test_a_peer_that_is_lost_while_the_pool_is_measured_is_noticed(job):
    def work(peers):
        if peers.peer == 2:
            peers.close()
            return None
        return measure_pool(peers, job, ROWS, DEVICE)

    *others, _ = in_pool(3, work, timeout_s=3)
    assert all(isinstance(error, PeerError) for error in others)


def test_it_leaves_no_gradient_behind(job):
    before = torch.is_grad_enabled()
    measure_device(job, ROWS)
    assert torch.is_grad_enabled() == before
