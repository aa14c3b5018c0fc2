"""The ends: embedding and head as the model has them, read one tensor at a time by whatever name they have."""

from __future__ import annotations

import json
import threading

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM

from tests.unit.hand_device import VOCABULARY, WIDTH
from tidelock.errors import ModelError
from tidelock.model.checkpoint import Checkpoint
from tidelock.model.ends import Ends, empty_model, end_tensors, read_config, write_device_folder

SMALL = {
    "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 4, "vocab_size": 64,
    "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip

pytestmark = pytest.mark.usefixtures("own_cache")


def save(folder, model_type, *, rename=lambda name: name, change=lambda tensors: None, **more):
    """Save a random model under other names or with other tensors; return it and its ends' source."""
    torch.manual_seed(4)
    config = AutoConfig.for_model(model_type, **{**SMALL, **more})
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    model.save_pretrained(folder)
    tensors = {rename(name): tensor for name, tensor in load_file(folder / "model.safetensors").items()}
    change(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return model


def open_ends(folder):
    return Ends(read_config(folder), Checkpoint.open(str(folder)))


STATE = torch.linspace(-2, 2, 5 * WIDTH).view(5, WIDTH)


def assert_same_ends(ends, model):
    ids = torch.tensor([[0, 5], [63, 5]])
    assert torch.equal(ends.embed(ids), model.get_input_embeddings()(ids))
    assert torch.allclose(ends.logits(STATE), model.get_output_embeddings()(STATE), atol=1e-6)


@pytest.mark.parametrize(
    ("model_type", "more"),
    [
        ("llama", {}),
        ("llama", {"tie_word_embeddings": True}),
        ("opt", {"ffn_dim": 48}),
        ("bloom", {}),
        ("gpt2", {}),
        ("gpt_neox", {}),
        ("gemma", {"head_dim": 8}),
        ("phi", {}),
    ],
)
def test_ends_are_the_models_own(tmp_path, model_type, more):
    model = save(tmp_path, model_type, **more)
    ends = open_ends(tmp_path)
    assert_same_ends(ends, model)
    assert ends.folder == tmp_path
    assert ends.head.weight.shape == (VOCABULARY, WIDTH)


def test_a_heads_bias_is_read_too(tmp_path):
    model = save(tmp_path, "phi", change=lambda tensors: tensors["lm_head.bias"].normal_())
    ends = open_ends(tmp_path)
    bias = load_file(tmp_path / "model.safetensors")["lm_head.bias"]
    assert torch.allclose(ends.logits(STATE), STATE @ model.lm_head.weight.T + bias, atol=1e-5)


def test_what_a_family_does_to_its_logits_is_done(tmp_path):
    model = save(tmp_path, "gemma2", head_dim=8, final_logit_softcapping=0.5)
    logits = open_ends(tmp_path).logits(100 * STATE)
    assert logits.abs().max() <= 0.5
    raw = model.lm_head(100 * STATE)
    assert torch.allclose(logits, 0.5 * torch.tanh(raw / 0.5), atol=1e-5)


def test_a_head_that_asks_for_more_than_the_last_state_is_refused(tmp_path):
    save(tmp_path, "mixtral", num_local_experts=2, num_key_value_heads=2)
    with pytest.raises(
        ModelError, match=r"type 'mixtral': expected a head that needs the last state, got one that asks"
    ):
        open_ends(tmp_path)


def test_half_precision_is_stored_and_single_is_computed(tmp_path):
    save(tmp_path, "llama", change=lambda tensors: tensors.update({n: t.bfloat16() for n, t in tensors.items()}))
    ends = open_ends(tmp_path)
    assert ends.embed(torch.tensor([1])).dtype == torch.float32
    assert ends.logits(STATE).dtype == torch.float32


def test_nothing_but_the_ends_is_read(tmp_path, monkeypatch):
    save(tmp_path, "llama")
    read: list[str] = []
    original = Checkpoint.read

    def note(self, name):
        read.append(name)
        return original(self, name)

    monkeypatch.setattr(Checkpoint, "read", note)
    ends = open_ends(tmp_path)
    assert sorted(read) == ["lm_head.weight", "model.embed_tokens.weight"]
    assert sorted(ends.stored_names.values()) == sorted(read)


def test_a_tied_head_is_not_read_and_is_the_embedding(tmp_path):
    save(tmp_path, "llama", tie_word_embeddings=True)
    ends = open_ends(tmp_path)
    assert list(ends.stored_names) == ["model.embed_tokens.weight"]
    assert ends.head.weight is ends._embedding.weight


@pytest.mark.parametrize(
    ("model_type", "rename", "stored"),
    [
        ("gpt2", lambda name: name.removeprefix("transformer."), "wte.weight"),
        ("bloom", lambda name: name.removeprefix("transformer."), "word_embeddings.weight"),
        ("gpt_neox", lambda name: name.replace("lm_head.", "embed_out."), "embed_out.weight"),
        ("llama", lambda name: name if name.startswith("model.") else f"model.{name}", "model.lm_head.weight"),
    ],
)
def test_former_names_are_found(tmp_path, model_type, rename, stored):
    model = save(tmp_path, model_type, rename=rename)
    ends = open_ends(tmp_path)
    assert stored in ends.stored_names.values()
    assert_same_ends(ends, model)


@pytest.mark.parametrize("name", ["model.embed_tokens.weight", "lm_head.weight"])
def test_a_missing_end_is_named(tmp_path, name):
    save(tmp_path, "llama", change=lambda tensors: tensors.pop(name))
    with pytest.raises(ModelError, match=f"Tensor '{name}': expected it among the model's 11 stored tensors"):
        open_ends(tmp_path)


@pytest.mark.parametrize("shape", [(64, 31), (63, 32), (64 * 32,)])
def test_an_end_of_another_shape_is_refused(tmp_path, shape):
    save(tmp_path, "llama", change=lambda tensors: tensors.update({"lm_head.weight": torch.zeros(shape)}))
    with pytest.raises(ModelError, match=r"Tensor 'lm_head.weight': expected shape \(64, 32\) as config.json has it"):
        open_ends(tmp_path)


@pytest.mark.parametrize(
    "content", [None, "{}", "not json", '{"model_type": "nobody-knows-this"}', "[]", '{"model_type": 3}']
)
def test_a_configuration_that_is_none_is_refused(tmp_path, content):
    if content is not None:
        (tmp_path / "config.json").write_text(content)
    with pytest.raises(ModelError, match=r"Model configuration: expected a config.json of a model type"):
        read_config(tmp_path)


def test_code_that_comes_with_a_model_is_not_run(tmp_path):
    code = "raise SystemExit('the code was run')\nclass Evil: ...\n"
    (tmp_path / "evil.py").write_text(code)
    config = {"model_type": "evil", "auto_map": {"AutoConfig": "evil.Evil", "AutoModelForCausalLM": "evil.Evil"}}
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ModelError, match="models that bring code of their own are not loaded"):
        read_config(tmp_path)


def test_a_model_that_is_not_causal_is_refused():
    with pytest.raises(ModelError, match="Model type 'vit': expected a causal language model"):
        empty_model(AutoConfig.for_model("vit"))


def test_an_empty_model_has_shapes_and_no_weights():
    model = empty_model(AutoConfig.for_model("llama", **SMALL))
    # All but the norms' few ones.
    assert all(parameter.is_meta for parameter in model.parameters() if parameter.dim() > 1)
    assert model.lm_head.weight.shape == (64, 32)
    # Buffers, such as rotary frequencies, are real: they are computed, not stored.
    assert not any(buffer.is_meta for buffer in model.buffers())


def test_other_threads_make_real_modules_meanwhile():
    stop, made = threading.Event(), []

    def make():
        while not stop.is_set():
            made.append(nn.Linear(2, 2).weight.is_meta)

    thread = threading.Thread(target=make)
    thread.start()
    for _ in range(5):
        empty_model(AutoConfig.for_model("llama", **SMALL))
    stop.set()
    thread.join()
    assert made
    assert not any(made)


def test_ends_are_frozen_and_the_embedding_gives_no_graph(tmp_path):
    save(tmp_path, "llama")
    ends = open_ends(tmp_path)
    assert not ends.embed(torch.tensor([1])).requires_grad
    state = STATE.clone().requires_grad_()
    ends.logits(state).sum().backward()
    assert state.grad is not None
    assert torch.allclose(state.grad, ends.head.weight.sum(0).expand(5, -1), atol=1e-4)
    assert ends.head.weight.grad is None


def test_both_ends_move(tmp_path):
    save(tmp_path, "llama")
    ends = open_ends(tmp_path)
    ends.to(torch.device("meta"))
    assert ends.head.weight.is_meta
    assert ends.embed(torch.tensor([1], device="meta")).is_meta


@pytest.mark.parametrize("tied", [True, False])
def test_a_device_folder_is_all_that_ends_need(tmp_path, tied):
    source_folder, folder = tmp_path / "whole", tmp_path / "device"
    folder.mkdir()
    model = save(source_folder, "llama", tie_word_embeddings=tied)
    (source_folder / "tokenizer.json").write_text("{}")
    (source_folder / "secrets.txt").write_text("not for devices")
    source = Checkpoint.open(str(source_folder))
    names = end_tensors(empty_model(read_config(source_folder)), source)
    write_device_folder(source, names, folder)
    assert {path.name for path in folder.iterdir()} == {
        "config.json", "generation_config.json", "tokenizer.json", "model.safetensors",
    }  # fmt: skip
    assert Checkpoint.open(str(folder)).names() == set(names.values())
    assert len(names) == (1 if tied else 2)
    assert_same_ends(open_ends(folder), model)
