"""Loading a whole model: with the weights that are stored, in the dtype and on the device asked for, or not at all."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.unit.hand_device import BLOCKS
from tidelock.errors import ConfigError, ModelError
from tidelock.model.checkpoint import Checkpoint
from tidelock.model.load import BACKBONE_DTYPES, ModelChoice, load_cut_model

pytestmark = pytest.mark.usefixtures("own_cache")


def load(folder, **choice):
    return load_cut_model(Checkpoint.open(str(folder)), ModelChoice(str(folder), **choice))


@pytest.fixture
def copy(tiny_folder, tmp_path):
    """Return a function that copies the tiny model, changes it, and returns the folder."""

    def make(change=lambda tensors: None, **config):
        folder = shutil.copytree(tiny_folder, tmp_path / "model")
        tensors = load_file(folder / "model.safetensors")
        change(tensors)
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
        path = folder / "config.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), **config}))
        return folder

    return make


@pytest.mark.parametrize("name", ["fp32", "bf16"])
def test_the_weights_are_those_that_are_stored(tiny_folder, name):
    cut = load(tiny_folder, dtype=name)
    stored = load_file(tiny_folder / "model.safetensors")
    assert cut.dtype == BACKBONE_DTYPES[name]
    assert cut.geometry.num_blocks == BLOCKS
    for path, parameter in cut._decoder.named_parameters():
        assert torch.equal(parameter, stored[f"model.{path}"].to(cut.dtype))


def test_an_unknown_dtype_is_refused(tiny_folder):
    with pytest.raises(ConfigError, match=r"expected one of \['bf16', 'fp32', 'int8', 'nf4'\], got 'fp8'"):
        load(tiny_folder, dtype="fp8")


@pytest.mark.parametrize("name", ["quantum", "", "cpu:x", "xla"])
def test_a_device_that_is_not_there_is_refused(tiny_folder, name):
    with pytest.raises(ConfigError, match=f"Torch device: expected one that this machine has, got '{name}'"):
        load(tiny_folder, torch_device=name)


@pytest.mark.parametrize(
    ("config", "said"),
    [
        ({"model_type": "nobody-knows-this"}, "Model configuration: expected"),
        ({"hidden_act": "nonsense"}, "Loading the model: expected a language model"),
    ],
)
def test_a_configuration_that_cannot_be_built_is_refused(copy, config, said):
    with pytest.raises(ModelError, match=said):
        load(copy(**config))


def test_a_model_with_code_of_its_own_is_refused(copy):
    folder = copy(model_type="evil", auto_map={"AutoConfig": "evil.E", "AutoModelForCausalLM": "evil.E"})
    (folder / "evil.py").write_text("raise SystemExit('the code was run')\n")
    with pytest.raises(ModelError, match="models that bring code of their own are not loaded"):
        load(folder)


def test_a_tied_head_need_not_be_stored(copy):
    load(copy(lambda tensors: tensors.pop("lm_head.weight"), tie_word_embeddings=True))


@pytest.mark.parametrize("name", ["model.layers.1.mlp.up_proj.weight", "model.norm.weight", "lm_head.weight"])
def test_a_checkpoint_without_one_of_its_tensors_is_refused(copy, name):
    with pytest.raises(ModelError):
        load(copy(lambda tensors: tensors.pop(name)))


def test_a_configuration_with_more_blocks_than_are_stored_is_refused(copy):
    with pytest.raises(ModelError):
        load(copy(num_hidden_layers=BLOCKS + 1))


def test_weights_of_another_shape_than_the_configuration_has_are_refused(copy):
    with pytest.raises(ModelError):
        load(copy(intermediate_size=64))
