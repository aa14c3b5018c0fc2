"""Side networks beside T5 and BART with a head for whole texts, and what they keep in a cache."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

import tidelock
from tests.equivalence.test_side_seq2seq import pairs
from tests.support.parity import GRADIENT_TOLERANCE, LOSS_TOLERANCE, relative_error
from tests.support.plain_seq2seq import TINY_SEQ2SEQ, side_seq2seq, tiny_classifier, tiny_seq2seq
from tests.support.plain_side import randomise_side
from tidelock.cache.config import CacheConfig
from tidelock.device.side_seq2seq import SideSeq2SeqModel
from tidelock.errors import ConfigError, ModelError
from tidelock.peft.export import load_adapter
from tidelock.peft.side import SideConfig
from tidelock.run.connect import connect
from tidelock.run.connect_side import connect_side

ADDED = SideConfig(init="random", zero_upsample=False)


def texts(name: str, num_labels: int, *, padding: str = "right") -> dict[str, Tensor]:
    """Return sources that end in the end-of-text token, as transformers' classifiers want them, and a label each."""
    batch = pairs(padding=padding)
    ids, mask = batch["input_ids"], batch["attention_mask"]
    end = tiny_seq2seq(name).config.eos_token_id
    for row in range(len(ids)):
        ids[row, int(mask[row].nonzero().max())] = end
    labels = torch.tensor([0.5, -1.0, 2.0]) if num_labels == 1 else torch.arange(3) % num_labels
    return {"input_ids": ids * mask, "attention_mask": mask, "labels": labels}


def with_head_of(ours: SideSeq2SeqModel, plain: torch.nn.Module) -> None:
    assert ours.head is not None
    ours.head.load_state_dict(plain.get_submodule("classification_head").state_dict())


@pytest.mark.parametrize("num_labels", [1, 3], ids=["regression", "classification"])
@pytest.mark.parametrize("name", TINY_SEQ2SEQ)
def test_it_begins_as_transformers_own_classifier(name: str, num_labels: int):
    """With an upsampling of zero nothing is added to the backbone's state."""
    plain = tiny_classifier(name, num_labels)
    ours = side_seq2seq(tiny_seq2seq(name), SideConfig(init="random"), num_labels).eval()
    with_head_of(ours, plain)
    batch = texts(name, num_labels)
    with torch.no_grad():
        expected, found = plain(**batch), ours(**batch)
    torch.testing.assert_close(found.loss, expected.loss, rtol=LOSS_TOLERANCE, atol=0)
    assert relative_error(found.logits, expected.logits) <= LOSS_TOLERANCE
    assert found.logits.shape == (3, num_labels)


@pytest.mark.parametrize("config", [ADDED, SideConfig(init="random", output="alone", zero_upsample=False, reduction=2)])
@pytest.mark.parametrize("name", ["t5", "t5_gated", "bart"])
def test_attached_to_transformers_own_classifier_it_computes_and_learns_alike(
    name: str, config: SideConfig, tmp_path: Path
):
    plain = tiny_classifier(name, 3)
    ours = side_seq2seq(tiny_seq2seq(name), config, 3).eval()
    randomise_side(ours.network)
    with_head_of(ours, plain)
    ours.save_adapter(tmp_path, "some/model")
    assert load_adapter(tmp_path).num_labels == 3
    for parameter in plain.get_submodule("classification_head").parameters():
        torch.nn.init.zeros_(parameter)  # it gets the saved one
    tidelock.attach_side(plain, tmp_path)
    batch = texts(name, 3)
    losses = []
    for model in (plain, ours):
        losses.append(model(**batch).loss)
        losses[-1].backward()
    torch.testing.assert_close(losses[1], losses[0], rtol=LOSS_TOLERANCE, atol=0)
    expected = {
        key.replace("side_network.", "network.", 1).replace("classification_head.", "head.", 1): parameter.grad
        for key, parameter in plain.named_parameters()
        if parameter.grad is not None
    }
    assert expected.keys() == dict(ours.named_parameters()).keys()
    for key, parameter in ours.named_parameters():
        grad = expected[key]
        assert parameter.grad is not None
        assert grad is not None
        size = max(float(grad.norm()), 1e-3 if parameter.ndim else 0.1)  # a gate's is a sum that cancels
        assert float((parameter.grad - grad).norm()) <= GRADIENT_TOLERANCE * size, key


def test_padding_on_the_left_means_the_same_to_t5():
    """It has no positions; what its decoder is given begins at the text's first token."""
    ours = side_seq2seq(tiny_seq2seq("t5"), ADDED, 3).eval()
    with torch.no_grad():
        right, left = (ours(**texts("t5", 3, padding=padding)).logits for padding in ("right", "left"))
    # Rows of other seeds of padding hold other ids at their real places: only the whole row is the same.
    torch.testing.assert_close(right[0], left[0], rtol=1e-4, atol=1e-5)


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    made = {}
    for name in TINY_SEQ2SEQ:
        made[name] = tmp_path_factory.mktemp("models") / name
        tiny_seq2seq(name).save_pretrained(made[name])
    return made


def connected(folder: Path, taps: Path | None, task: str = "text-to-text", codec: str = "fp32") -> SideSeq2SeqModel:
    cache = None if taps is None else CacheConfig(taps, codec=codec, key=taps.parent / "key")
    num_labels = 3 if task == "classification" else None
    torch.manual_seed(0)  # the head begins by the global generator
    model = connect_side("local", model=folder, task=task, num_labels=num_labels, side_config=ADDED, cache=cache)
    assert isinstance(model, SideSeq2SeqModel)
    randomise_side(model)
    return model.eval()


def gradients(model: SideSeq2SeqModel, batch: dict[str, Tensor]) -> dict[str, Tensor]:
    model.zero_grad()
    model(**batch).loss.backward()
    return {key: parameter.grad.clone() for key, parameter in model.named_parameters() if parameter.grad is not None}


@pytest.mark.parametrize("task", ["text-to-text", "classification"])
@pytest.mark.parametrize("name", TINY_SEQ2SEQ)
def test_cached_gradients_are_the_uncached_ones_bit_for_bit(
    name: str, task: str, folders: dict[str, Path], tmp_path: Path
):
    batch = pairs() if task == "text-to-text" else texts(name, 3)
    expected = gradients(connected(folders[name], None, task), batch)
    for computed in (3, 0):
        model = connected(folders[name], tmp_path / "taps", task)
        ours = gradients(model, batch)
        assert ours.keys() == expected.keys()
        assert all(torch.equal(ours[key], expected[key]) for key in expected)
        assert model.source.computed == computed
        assert model.source.has_blocks == (computed > 0)
    # In another order, one by one, with the blocks let go: nothing is computed again.
    for row in (2, 0, 1):
        width = int(batch["attention_mask"][row].sum())
        model(batch["input_ids"][row : row + 1, :width], labels=_row(batch["labels"], row))
    assert model.source.computed == 0


def _row(labels: Tensor, row: int) -> Tensor:
    one = labels[row : row + 1]
    return one if one.dim() == 1 else one[:, : int((one != -100).sum())]


def test_an_entry_is_of_source_and_target(folders: dict[str, Path], tmp_path: Path):
    model = connected(folders["t5"], tmp_path / "taps")
    batch = pairs()
    gradients(model, batch)
    batch["labels"][0, 0] += 1  # another answer to the same source
    gradients(model, batch)
    assert model.source.computed == 4
    examples = model.examples_of(batch)
    assert model.source.cache is not None
    for example in examples:
        kept = model.source.cache.get(example)
        assert kept is not None
        assert [tuple(tensor.shape) for tensor in kept] == model.tap_shapes(example)


def test_lossy_codecs_change_something_within_a_bound(folders: dict[str, Path], tmp_path: Path):
    batch = pairs()
    exact = gradients(connected(folders["bart"], None), batch)
    lossy = gradients(connected(folders["bart"], tmp_path / "taps", codec="bf16"), batch)
    ours, theirs = (torch.cat([value.flatten() for value in each.values()]) for each in (lossy, exact))
    assert 0 < relative_error(ours, theirs) <= 0.02


@pytest.mark.parametrize("name", TINY_SEQ2SEQ)
def test_ends_read_from_a_folder_are_those_of_the_whole_model(name: str, folders: dict[str, Path]):
    ours, whole = connected(folders[name], None), side_seq2seq(tiny_seq2seq(name), ADDED)
    state = torch.randn(5, ours.ends.width)
    ids = torch.arange(3, 9)
    assert torch.equal(ours.ends.embed(ids), whole.ends.embed(ids))
    assert torch.equal(ours.ends.logits(state), whole.ends.logits(state))


def test_what_does_not_go_together_is_refused(folders: dict[str, Path], tiny_models: Path):
    with pytest.raises(ConfigError, match=r"Task: expected text-to-text, .* an encoder-decoder \(t5\), got causal-lm"):
        connect_side("local", model=folders["t5"])
    with pytest.raises(ConfigError, match=r"Task: expected causal-lm, .* of a decoder \(llama\), got text-to-text"):
        connect_side("local", model=tiny_models / "llama", task="text-to-text")
    for name in ("t5", "bart"):
        with pytest.raises(ModelError, match=r"expected a decoder, got an encoder-decoder"):
            connect("local", model=folders[name])
