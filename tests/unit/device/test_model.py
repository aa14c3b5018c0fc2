"""The device's model: what it takes and refuses, what it counts, and that nothing moves on a number that is none."""

from __future__ import annotations

import logging
from types import SimpleNamespace

import pytest
import torch
from transformers import AutoModelForCausalLM

from tests.support.sites import attn
from tests.unit.hand_device import BLOCKS, POSITIONS, VOCABULARY, WIDTH
from tidelock.backbone.local import LocalBackbone
from tidelock.errors import ConfigError, NonFiniteError, WireError
from tidelock.model.cut import CutModel
from tidelock.model.rows import Rows

IGNORED = -100


def a_batch(side="right"):
    """Return ids, mask and labels of two rows, of 7 and of 4 real tokens, in 8 positions."""
    generator = torch.Generator().manual_seed(2)
    ids = torch.randint(3, VOCABULARY, (2, 8), generator=generator)
    mask = torch.zeros(2, 8, dtype=torch.long)
    for row, length in enumerate((7, 4)):
        columns = slice(0, length) if side == "right" else slice(8 - length, 8)
        mask[row, columns] = 1
    labels = torch.where(mask.bool(), ids, IGNORED)
    first = mask.argmax(1)
    for row in range(2):
        labels[row, first[row] : first[row] + 2] = IGNORED  # as a prompt is
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}


def gradients(model):
    return {name: parameter.grad for name, parameter in model.named_parameters()}


@pytest.mark.parametrize("side", ["left", "right"])
def test_loss_and_logits_are_those_of_the_whole_model(make_model, whole, side):
    batch = a_batch(side)
    if side == "left":
        batch["position_ids"] = (batch["attention_mask"].cumsum(1) - 1).clamp(min=0)
    theirs = whole(**batch)
    batch.pop("position_ids", None)
    ours = make_model(moved=False)(**batch)
    assert ours.loss.item() == pytest.approx(theirs.loss.item(), abs=1e-5)
    predicts = torch.zeros(2, 8, dtype=torch.bool)
    predicts[:, :-1] = batch["labels"][:, 1:] != IGNORED
    assert torch.allclose(ours.logits[predicts], theirs.logits[predicts], atol=1e-4)
    assert torch.equal(ours.logits[~predicts], torch.zeros_like(ours.logits[~predicts]))
    assert ours.logits.shape == (2, 8, VOCABULARY)
    assert ours.logits.dtype == torch.float32


def test_without_labels_every_real_token_has_logits(make_model, whole):
    batch = a_batch()
    real = batch["attention_mask"].bool()
    batch.pop("labels")
    ours = make_model(moved=False)(**batch)
    assert ours.loss is None
    assert torch.allclose(ours.logits[real], whole(**batch).logits[real], atol=1e-4)
    assert torch.equal(ours.logits[~real], torch.zeros_like(ours.logits[~real]))


def test_no_mask_means_that_all_tokens_are_real(make_model, whole):
    ids = a_batch()["input_ids"]
    assert torch.allclose(make_model(moved=False)(ids).logits, whole(ids).logits, atol=1e-4)


@pytest.mark.parametrize("count", [3, 40, torch.tensor(3), None])
def test_the_loss_divides_by_num_items_in_batch_as_the_whole_models_does(make_model, whole, count):
    batch = a_batch()
    expected = whole(**batch, num_items_in_batch=count).loss
    assert make_model(moved=False)(**batch, num_items_in_batch=count).loss.item() == pytest.approx(expected.item())


def test_trainer_is_told_that_the_loss_divides_by_itself(make_model):
    assert make_model().accepts_loss_kwargs is True


def test_gradients_add_up_over_passes_as_any_modules_do(make_model):
    model, batch = make_model(), a_batch()
    model(**batch).loss.backward()
    once = {name: grad.clone() for name, grad in gradients(model).items()}
    assert all(grad.abs().sum() > 0 for grad in once.values())
    model(**batch).loss.backward()
    assert all(torch.allclose(grad, 2 * once[name]) for name, grad in gradients(model).items())


def test_passes_may_be_open_at_once(make_model):
    model, batch = make_model(), a_batch()
    model(**batch).loss.backward()
    expected = {name: 2 * grad for name, grad in gradients(model).items()}
    model.zero_grad()
    first, second = model(**batch).loss, model(**batch).loss
    (first + second).backward()
    assert all(torch.allclose(grad, expected[name]) for name, grad in gradients(model).items())


@pytest.mark.parametrize(("row", "column"), [(0, 7), (1, 4), (1, 7)])
def test_labels_at_padding_are_refused(make_model, row, column):
    batch = a_batch()
    batch["labels"][row, column] = 5
    with pytest.raises(ConfigError, match="Labels: expected -100 at padding"):
        make_model()(**batch)


def test_labels_at_left_padding_are_refused(make_model):
    batch = a_batch("left")
    batch["labels"][1, 0] = 5
    with pytest.raises(ConfigError, match="Labels: expected -100 at padding"):
        make_model()(**batch)


@pytest.mark.parametrize(
    "mask", [[[1, 0, 1, 1, 1, 1, 1, 1]] * 2, [[1] * 8, [0] * 8], [[0, 1, 1, 0, 1, 1, 0, 0]] * 2], ids=str
)
def test_masks_with_gaps_or_without_a_token_are_refused(make_model, mask):
    batch = a_batch()
    with pytest.raises(ConfigError, match="Attention mask: expected one run"):
        make_model()(**{**batch, "attention_mask": torch.tensor(mask)})


def test_rows_longer_than_the_model_was_made_for_are_refused(make_model):
    model = make_model()
    model(torch.ones(1, POSITIONS, dtype=torch.long))
    with pytest.raises(ConfigError, match=f"at most {POSITIONS} tokens a row, as the model was made for, got 65"):
        model(torch.ones(1, POSITIONS + 1, dtype=torch.long))


def test_padding_does_not_count_as_length(make_model):
    batch = {name: torch.nn.functional.pad(value, (0, 90), value=IGNORED if name == "labels" else 0)
             for name, value in a_batch().items()}  # fmt: skip
    padded = make_model()(**batch)
    assert padded.logits.shape == (2, 98, VOCABULARY)
    assert torch.equal(padded.loss, make_model()(**a_batch()).loss)


@pytest.mark.parametrize("name", ["position_ids", "inputs_embeds", "past_key_values", "token_type_ids", "nonsense"])
def test_unknown_arguments_are_refused_by_name(make_model, name):
    with pytest.raises(ConfigError, match=f"got the arguments \\['{name}'\\]"):
        make_model()(**a_batch(), **{name: torch.ones(2, 8)})


def test_unknown_arguments_that_are_none_are_let_through(make_model):
    make_model()(**a_batch(), position_ids=None, use_cache=False, return_dict=True, output_hidden_states=False)


def test_no_ids_are_refused(make_model):
    with pytest.raises(ConfigError, match="got no input_ids"):
        make_model()(labels=a_batch()["labels"])


def test_a_batch_without_a_labelled_token_is_refused(make_model):
    batch = a_batch()
    batch["labels"].fill_(IGNORED)
    with pytest.raises(ConfigError, match="at least one token with a loss"):
        make_model()(**batch)
    # The first token of a row is predicted by none.
    batch["labels"][0, 0] = 5
    with pytest.raises(ConfigError, match="at least one token with a loss"):
        make_model()(**batch)


def test_a_rows_first_label_after_padding_is_not_predicted_from_padding(make_model):
    batch = a_batch("left")
    expected = make_model()(**batch).loss
    batch["labels"][1, 4] = 9
    assert torch.equal(make_model()(**batch).loss, expected)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_loss_that_is_no_number_is_refused(make_model, value):
    model = make_model()
    with torch.no_grad():
        # Not a query's: torch's attention can lose a NaN of a score where a row is this short.
        next(p for name, p in model.named_parameters() if "v_proj.lora_B" in name).fill_(value)
    with pytest.raises(NonFiniteError, match="Loss: expected a finite number, got nan"):
        model(**a_batch())
    assert all(grad is None for grad in gradients(model).values())


def test_a_gradient_that_is_no_number_moves_nothing(make_model):
    model = make_model()
    model(**a_batch()).loss.backward()
    before = {name: grad.clone() for name, grad in gradients(model).items()}
    loss = model(**a_batch()).loss
    with pytest.raises(NonFiniteError, match="expected finite gradients"):
        (loss * float("inf")).backward()
    assert all(torch.equal(grad, before[name]) for name, grad in gradients(model).items())


def test_one_bad_gradient_among_good_ones_is_found(make_model, monkeypatch):
    model = make_model()
    loss = model(**a_batch()).loss
    last = model.bank.at(attn(BLOCKS - 1))
    original = torch.autograd.grad

    def spoil(outputs, inputs, *args, **kwargs):
        grads = list(original(outputs, inputs, *args, **kwargs))
        for index, wanted in enumerate(inputs):
            if wanted is next(last.parameters()):
                grads[index] = grads[index].index_fill(0, torch.tensor([0]), float("nan"))
        return tuple(grads)

    monkeypatch.setattr(torch.autograd, "grad", spoil)
    with pytest.raises(NonFiniteError, match="expected finite gradients"):
        loss.backward()
    assert all(grad is None for grad in gradients(model).values())


def test_a_second_backward_is_refused(make_model):
    model = make_model()
    loss = model(**a_batch()).loss
    loss.backward(retain_graph=True)
    before = {name: grad.clone() for name, grad in gradients(model).items()}
    with pytest.raises(WireError, match="expected one for each forward pass, got a second one"):
        loss.backward()
    assert all(torch.equal(grad, before[name]) for name, grad in gradients(model).items())


def test_a_site_that_got_no_gradient_stops_the_step(make_model, monkeypatch):
    model = make_model()
    loss = model(**a_batch()).loss
    monkeypatch.setattr(LocalBackbone, "forward", None)
    monkeypatch.setattr("tidelock.backbone.local.LocalPass.backward", lambda self, grad_MD: None)
    with pytest.raises(WireError, match=f"a gradient for each of {BLOCKS * 4} PEFT tensors, got none for {BLOCKS * 4}"):
        loss.backward()
    assert all(grad is None for grad in gradients(model).values())


def test_evaluation_keeps_no_graph(make_model):
    model = make_model()
    with torch.no_grad():
        output = model(**a_batch())
    assert not output.loss.requires_grad
    assert not output.logits.requires_grad


def test_frozen_parameters_get_no_gradient(make_model):
    model = make_model()
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("lora_B" in name)
    model(**a_batch()).loss.backward()
    assert {name for name, grad in gradients(model).items() if grad is not None} == {
        name for name, _ in model.named_parameters() if "lora_B" in name
    }


def test_only_peft_tensors_are_parameters_and_state(make_model):
    model = make_model()
    names = {
        f"bank.blocks.{block}.attn.branches.{projection}.{matrix}.weight"
        for block in range(BLOCKS) for projection in ("q_proj", "v_proj") for matrix in ("lora_A", "lora_B")
    }  # fmt: skip
    assert {name for name, _ in model.named_parameters()} == names
    assert set(model.state_dict()) == names
    assert not list(model.buffers())


def test_a_state_goes_into_another_model(make_model):
    first, second = make_model(), make_model(moved=False)
    second.load_state_dict(first.state_dict())
    assert torch.equal(second(**a_batch()).loss, first(**a_batch()).loss)


def test_device_and_dtype_are_those_of_the_modules(make_model):
    model = make_model()
    assert (model.device, model.dtype) == (torch.device("cpu"), torch.float32)
    model.to(torch.bfloat16)
    assert model.dtype == torch.bfloat16
    output = model(**a_batch())
    output.loss.backward()
    assert output.logits.dtype == torch.float32
    assert all(grad.dtype == torch.bfloat16 for grad in gradients(model).values())


def test_the_base_models_states_are_those_of_the_whole_model(make_model, whole):
    batch = a_batch()
    batch.pop("labels")
    model = make_model(moved=False)
    states = model.base_model(**batch).last_hidden_state
    real = batch["attention_mask"].bool()
    theirs = whole.model(**batch).last_hidden_state
    assert states.shape == (2, 8, WIDTH)
    assert torch.allclose(states[real], theirs[real], atol=1e-5)
    assert torch.equal(states[~real], torch.zeros_like(states[~real]))
    head = model.get_output_embeddings()
    assert torch.equal(head.weight, whole.lm_head.weight)
    assert not head.weight.requires_grad


def test_a_frozen_backbone_stays_as_it_was(make_model, tiny_folder):
    model = AutoModelForCausalLM.from_pretrained(tiny_folder, dtype=torch.float32)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    device_model = make_model()
    device_model.backbone = LocalBackbone(CutModel(model))
    device_model(**a_batch()).loss.backward()
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert all(parameter.grad is None for parameter in model.parameters())


def test_dropout_is_repeated_by_the_seed_and_differs_between_passes(make_model):
    model, batch = make_model(lora_dropout=0.5), a_batch()

    def losses():
        torch.manual_seed(11)
        return [model(**batch).loss.item() for _ in range(4)]

    first = losses()
    assert losses() == first
    assert len(set(first)) == 4
    model.eval()
    assert len({model(**batch).loss.item() for _ in range(2)}) == 1


def test_evaluation_draws_no_random_number(make_model):
    model = make_model(lora_dropout=0.5).eval()
    state = torch.get_rng_state()
    with torch.no_grad():
        model(**a_batch())
    assert torch.equal(torch.get_rng_state(), state)


def test_every_training_pass_draws_a_seed_of_its_own(make_model):
    model = make_model()
    rows = Rows((0,), (2,), 2)
    seeds = [model.open_batch(torch.tensor([[1, 2]]), rows, torch.arange(2)).seed for _ in range(2)]
    assert seeds[0] != seeds[1]
    with torch.no_grad():
        assert model.open_batch(torch.tensor([[1, 2]]), rows, torch.arange(2)).seed == 0


def test_what_trainers_call_is_harmless(make_model, caplog):
    model = make_model()
    with caplog.at_level(logging.DEBUG):
        model.add_model_tags(["trl", "sft"])
        model.activation_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        model.gradient_checkpointing_enable()
    assert caplog.text.count("no effect") == 2
    assert "['trl', 'sft'] are not kept" in caplog.text


def test_closing_lets_go_of_the_backbone(make_model):
    closed: list[str] = []
    model = make_model()
    model.backbone = SimpleNamespace(close=lambda: closed.append("closed"))
    model.close()
    assert closed == ["closed"]


SHAPES = "device/model.py: shapes of ids, mask and labels are not compared"


@pytest.mark.parametrize("shape", [(2, 6), (1, 8), (2, 10), (4, 8), (8,)], ids=str)
def test_a_mask_of_another_shape_than_the_ids_is_refused(make_model, shape):
    with pytest.raises(ConfigError):
        make_model()(a_batch()["input_ids"], attention_mask=torch.ones(shape, dtype=torch.long))


@pytest.mark.parametrize("shape", [(2, 6), (1, 8), (4, 8)], ids=str)
def test_labels_of_another_shape_than_the_ids_are_refused(make_model, shape):
    with pytest.raises(ConfigError):
        make_model()(a_batch()["input_ids"], labels=torch.ones(shape, dtype=torch.long))


def test_the_lowest_module_may_be_frozen(make_model):
    model = make_model()
    model.bank.module(0).requires_grad_(False)
    model(**a_batch()).loss.backward()
    assert all((grad is None) == (".0." in name) for name, grad in gradients(model).items())
