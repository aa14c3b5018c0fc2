"""The two ends of a model, which stay with the device: the word embedding and the language-model head.

Both are the model's own modules. The head runs as the model's own causal `forward` around a decoder that is only a
stub, so that whatever a family does between the last norm and the logits (soft-capping, scaling) is done.

May import errors, `model` and libraries.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from typing import TYPE_CHECKING, Any, cast, final

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSeq2SeqLM
from transformers.modeling_outputs import BaseModelOutputWithPastAndCrossAttentions

from tidelock.errors import ModelError
from tidelock.model.geometry import Geometry, geometry_of

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping
    from pathlib import Path

    from transformers import PretrainedConfig, PreTrainedModel

    from tidelock.model.checkpoint import TensorSource

_TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "tokenizer.model",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "chat_template.jinja",
    "chat_template.json",
)
# What a device reads of a model's folder besides tensors; safetensors files are never among them.
_SMALL_FILES = ("config.json", "generation_config.json", *_TOKENIZER_FILES)


def read_config(folder: Path) -> PretrainedConfig:
    """Return the model's configuration; code that comes with a model is never run.

    Raises:
        ModelError: There is no readable config.json of a model type that `transformers` knows.
    """
    try:
        config = AutoConfig.from_pretrained(folder, trust_remote_code=False, local_files_only=True)
        return cast("PretrainedConfig", config)
    except (OSError, ValueError, KeyError, json.JSONDecodeError) as error:
        msg = (
            f"Model configuration: expected a config.json of a model type that transformers knows, got "
            f"{type(error).__name__} ({folder}). Check the folder; models that bring code of their own are not loaded."
        )
        raise ModelError(msg) from error


def tokenizer_sha256(folder: Path) -> str:
    """Return one hash over the tokenizer's files in a model's folder, in hex; of none where there is no tokenizer."""
    digest = hashlib.sha256()
    for name in _TOKENIZER_FILES:
        if (folder / name).is_file():
            digest.update(name.encode() + hashlib.sha256((folder / name).read_bytes()).digest())
    return digest.hexdigest()


def model_class(config: PretrainedConfig) -> Any:  # noqa: ANN401  (transformers' own have no common type)
    """Return the class that makes a configuration's language model."""
    return AutoModelForSeq2SeqLM if config.is_encoder_decoder else AutoModelForCausalLM


@final
class _EmptyWeights(TorchFunctionMode):
    """Has modules make their weights on the meta device, and their buffers as always.

    accelerate's `init_empty_weights` changes `nn.Module` for all threads while it lasts; this changes nothing outside
    its own.
    """

    def __torch_function__(
        self, func: Callable[..., Any], _types: object, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:  # noqa: ANN401  (as the base class has it)
        kwargs = kwargs or {}
        return func(*args, **{**kwargs, "device": "meta"}) if func is torch.empty else func(*args, **kwargs)


def empty_model(config: PretrainedConfig) -> PreTrainedModel:
    """Return the language model of a configuration with weights on the meta device, which take no memory.

    Raises:
        ModelError: The configuration is not one of a causal language model, nor of an encoder-decoder.
    """
    try:
        with _EmptyWeights():
            model = model_class(config).from_config(config, dtype=torch.float32, trust_remote_code=False)
    except ValueError as error:
        msg = (
            f"Model type {config.model_type!r}: expected a causal language model, got one that transformers has no "
            "causal class for. Use a decoder such as LLaMA, OPT or GPT-2."
        )
        raise ModelError(msg) from error
    return cast("PreTrainedModel", model)


@final
class GivenState(nn.Module):
    """Stands where the decoder was: hands on the state that it is given."""

    def forward(self, *_args: Any, inputs_embeds: Tensor, **_kwargs: Any) -> BaseModelOutputWithPastAndCrossAttentions:
        """Return the state that was to go into the decoder."""
        # This class has every field that a causal model may hand on; GPT-2 asks for cross_attentions.
        return BaseModelOutputWithPastAndCrossAttentions(last_hidden_state=inputs_embeds)


@final
class Ends:
    """A model's embedding and head, without the blocks between.

    Not an `nn.Module`, so that neither is found among the parameters that training, saving and counting walk over.

    Args:
        config: The model's configuration.
        source: Where its tensors are read from, one by one.

    Attributes:
        config: As given.
        folder: Where the configuration and the tokenizer's files are.
        geometry: The shape of the model.
        head: The head's linear layer, which TRL's fused loss reads.
        stored_names: The name under which the source stores each parameter of the ends.
        is_tied: Whether the head's weight is the embedding's.

    Raises:
        ModelError: A tensor of the ends is missing or has the wrong shape, or the head needs more than the final state.
    """

    def __init__(self, config: PretrainedConfig, source: TensorSource) -> None:
        model = empty_model(config)
        self.config = config
        self.folder = source.folder
        self.geometry: Geometry = geometry_of(model)
        self._embedding = model.get_input_embeddings()
        # Asked for while the decoder is there: without it the model no longer finds its own parts.
        self.head = cast("nn.Linear", model.get_output_embeddings())
        self._head_model = model
        self.stored_names = load_ends(model, source)
        self._parameters = {name: model.get_parameter(name) for name in self.stored_names}
        parent, _, name = self.geometry.family.decoder.rpartition(".")
        setattr(model.get_submodule(parent), name, GivenState())
        self.is_tied = self.head.weight is self._embedding.weight
        self._embedding.eval().requires_grad_(requires_grad=False)
        self._head_model.eval().requires_grad_(requires_grad=False)
        self._try_head()

    def to(self, device: torch.device) -> None:
        """Move both ends."""
        self._embedding.to(device)
        cast("nn.Module", self._head_model).to(device)

    @property
    def max_positions(self) -> int | None:
        """The most positions that the model was made for, where there is a limit."""
        return self.geometry.max_positions

    @property
    def embedding(self) -> Tensor:
        """The word embedding's weight, fp32 of shape (V, E)."""
        return self._embedding.get_parameter("weight")

    def learn(self, *, embedding: bool, head: bool) -> dict[str, nn.Parameter]:
        """Have an end learn, or both; return the parameters by their names in the model.

        Args:
            embedding: Whether the embedding does.
            head: Whether the head does; where it is the embedding, it is so with either.
        """
        weight = self.embedding
        found = {
            name: parameter
            for name, parameter in self._parameters.items()
            if (parameter is weight and (embedding or self.is_tied)) or (parameter is not weight and head)
        }
        for parameter in found.values():
            parameter.requires_grad_()
        return found

    def embed(self, ids: Tensor) -> Tensor:
        """Return word embeddings, shape (*ids.shape, E), fp32."""
        return cast("Tensor", self._embedding(ids))

    def logits(self, final_MD: Tensor) -> Tensor:
        """Return the head's logits, shape (M, V), fp32; differentiable in the state."""
        output = self._head_model(inputs_embeds=final_MD[None], use_cache=False, return_dict=True)
        return cast("Tensor", output.logits[0])

    @torch.no_grad()
    def _try_head(self) -> None:
        """Refuse a family whose causal model asks its decoder for more than the final state."""
        try:
            self.logits(torch.zeros(1, self.geometry.final_width))
        except AttributeError as error:
            msg = (
                f"Cutting a model of type {self.config.model_type!r}: expected a head that needs the last state, "
                f"got one that asks its decoder for {error.name!r} too ({type(self._head_model).__name__}). Models "
                "with routed experts and the like cannot be cut yet; use another."
            )
            raise ModelError(msg) from error


def end_tensors(model: PreTrainedModel, source: TensorSource) -> dict[str, str]:
    """Return, for each parameter of the ends, the name under which the source stores it.

    Args:
        model: The causal model, on the meta device or not.
        source: The stored tensors. A tied head is not stored, and not in the answer.

    Raises:
        ModelError: A parameter of the ends is not stored.
    """
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    tied = bool(model.config.get_text_config().tie_word_embeddings)
    paths = {id(module): path for path, module in model.named_modules()}
    wanted = [f"{paths[id(embedding)]}.weight"]
    wanted += [
        f"{paths[id(head)]}.{name}"
        for name, _ in cast("nn.Module", head).named_parameters()
        if not (tied and name == "weight")
    ]
    return {path: stored_name(path, model.base_model_prefix, source) for path in wanted}


def stored_name(path: str, prefix: str, source: TensorSource) -> str:
    """Return the stored name of a parameter.

    Older checkpoints leave the base model's prefix out; those of GPT-NeoX call the head by its former name.
    """
    names = source.names()
    former = path.replace("lm_head.", "embed_out.")
    for candidate in (path, path.removeprefix(f"{prefix}."), f"{prefix}.{path}", former):
        if candidate in names:
            return candidate
    msg = f"Tensor {path!r}: expected it among the model's {len(names)} stored tensors, got none of that name "
    msg += f"({source.folder}). Is this the whole checkpoint of a language model?"
    raise ModelError(msg)


def load_ends(model: PreTrainedModel, source: TensorSource) -> dict[str, str]:
    """Read the parameters of the ends into a model that is on the meta device; return their names as `end_tensors`.

    Raises:
        ModelError: One is missing or has the wrong shape.
    """
    names = end_tensors(model, source)
    embedding, head = model.get_input_embeddings(), cast("nn.Module", model.get_output_embeddings())
    for path, stored in names.items():
        owner, _, name = path.rpartition(".")
        expected = model.get_submodule(owner).get_parameter(name).shape
        tensor = read_as(source, stored, expected)
        setattr(model.get_submodule(owner), name, nn.Parameter(tensor, requires_grad=False))
    if head.get_parameter("weight").is_meta:
        setattr(head, "weight", embedding.get_parameter("weight"))  # noqa: B010  (a tied head is the embedding)
    return names


def read_as(source: TensorSource, stored: str, shape: torch.Size) -> Tensor:
    """Return a stored tensor in fp32.

    Raises:
        ModelError: Its shape is another.
    """
    tensor = source.read(stored)
    if tensor.shape != shape:
        msg = (
            f"Tensor {stored!r}: expected shape {tuple(shape)} as config.json has it, got {tuple(tensor.shape)} "
            f"({source.folder}). Configuration and weights are of different models."
        )
        raise ModelError(msg)
    return tensor.to(torch.float32)


def write_device_folder(source: TensorSource, names: Mapping[str, str], folder: Path) -> None:
    """Write a model folder that holds what a device needs: the ends' tensors and the small files.

    Args:
        source: The whole model.
        names: As from `end_tensors`.
        folder: An existing, empty folder.
    """
    copy_small_files(source.folder, folder)
    tensors = {stored: source.read(stored).contiguous() for stored in names.values()}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def copy_small_files(source: Path, folder: Path, *, with_config: bool = True) -> None:
    """Copy what a model's folder has besides tensors: its tokenizer's files, and its configuration or not."""
    for name in _SMALL_FILES:
        if (source / name).is_file() and (with_config or name != "config.json"):
            shutil.copyfile(source / name, folder / name)
