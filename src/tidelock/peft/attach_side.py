"""A side network beside an ordinary `transformers` model, for whoever wants a trained one without tidelock.

The forward of the model's decoder is wrapped: it runs as always, without a graph, then the side network reads what its
blocks gave, and the state that goes to the head is the side network's. The model's `generate` does the rest: the side
blocks' keys and values are further layers of its own cache, so that beams are reordered and rows repeated with it.

Shapes: B rows, T positions, N = B T, E embedding width, D hidden width.
May import `peft`, `model`, errors and libraries.
"""

from __future__ import annotations

import functools
import inspect
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast, final

import torch
from torch import Tensor, nn
from transformers import Cache, DynamicCache
from transformers.cache_utils import DynamicLayer

from tidelock.errors import ConfigError
from tidelock.model.ends import empty_model
from tidelock.model.geometry import geometry_of
from tidelock.model.rows import Layout
from tidelock.model.taps import Taps
from tidelock.model.watch import reading, watch
from tidelock.peft.export import load_adapter
from tidelock.peft.side import SideConfig, SideNetwork
from tidelock.peft.side_files import apply_side

if TYPE_CHECKING:
    import os
    from collections.abc import Sequence

    from transformers import PreTrainedModel

    from tidelock.model.geometry import Geometry

_NAME = "side_network"


def attach_side(model: PreTrainedModel, folder: str | os.PathLike[str]) -> nn.Module:
    """Put a side network beside an ordinary model, which computes with it from then on, in `generate` too.

    The model's own weights are frozen and its dropout stays off; only the side network, and a head for whole texts,
    can be trained on.

    Args:
        model: The whole model that the side network was trained beside: an `AutoModelForCausalLM`, or for an adapter
            with a head for whole texts an `AutoModelForSequenceClassification` with as many labels, whose `score`
            becomes that head.
        folder: The adapter's, as `SideModel.save_adapter` or `tidelock export --to adapter` wrote it.

    Returns:
        The side network, in fp32 on the model's device; also the model's `side_network`, so that it moves with it.

    Raises:
        CheckpointError: The folder has no readable adapter, or it does not fit the model.
        ConfigError: It is no side network, or the model has one already.
        ModelError: The model's family cannot have one.

    Example::

        model = AutoModelForCausalLM.from_pretrained("HuggingFaceTB/SmolLM2-135M-Instruct")
        tidelock.attach_side(model, "my-run/adapter")
        model.generate(**inputs)
    """
    adapter = load_adapter(Path(folder))
    if not isinstance(adapter.config, SideConfig) or hasattr(model, _NAME):
        got = "a model that has one" if hasattr(model, _NAME) else "an adapter of another method"
        msg = (
            f"Attaching a side network: expected one, and a model without, got {got} ({folder}). Load the model anew, "
            "or see how that method's adapters are loaded."
        )
        raise ConfigError(msg)
    # The places of the blocks are the causal model's, whatever head this one has.
    geometry = geometry_of(empty_model(model.config))
    network = SideNetwork(adapter.config, model.config, geometry)
    score = getattr(model, "score", None)
    head = score if isinstance(score, nn.Linear) else None
    apply_side(adapter, network, head)
    model.requires_grad_(requires_grad=False)
    if head is not None:
        head.requires_grad_()
    embedding = model.get_input_embeddings()
    network.to(next(embedding.parameters()).device).train(model.training)
    model.add_module(_NAME, network)
    _wrap(model, network, geometry)
    return network


def _wrap(model: PreTrainedModel, network: SideNetwork, geometry: Geometry) -> None:
    """Have the model's decoder give the side network's final state."""
    family = geometry.family
    decoder = model.get_submodule(family.decoder)
    frozen = FrozenStack(decoder, family.blocks, model.get_input_embeddings())

    @functools.wraps(decoder.forward)
    def forward(*args: Any, **kwargs: Any) -> Any:  # noqa: ANN401  (as the decoder has it)
        run = frozen.run(network.blocks, args, kwargs)
        cache = None if run.cache is None else beside(run.cache, frozen.num_blocks, network.new_cache(), run.past)
        every_N = torch.arange(len(run.embeddings_NE))
        return run.output_with(network(run.embeddings_NE, run.taps, run.layout, every_N, cache))

    decoder.forward = forward


@final
@dataclass(frozen=True, slots=True)
class FrozenRun:
    """What one call of a frozen stack gave; its tokens, padding among them, are packed row by row.

    Attributes:
        embeddings_NE: The word embeddings.
        taps: The tapped blocks' outputs, and the final state.
        layout: How the tokens lie in the batch.
        cache: The stack's, extended already; None without one.
        past: How many positions were in the cache before.
        given: What else the stack was called with.
        output: What it returned.
    """

    embeddings_NE: Tensor
    taps: Taps
    layout: Layout
    cache: Cache | None
    past: int
    given: dict[str, Any]
    output: Any

    def output_with(self, final_ND: Tensor) -> Any:  # noqa: ANN401  (as the stack has it)
        """Return the stack's output with another final state in the place of its own."""
        final_BTD = final_ND.to(self.taps.final_MD).view(*self.layout.shape_BT, -1)
        if isinstance(self.output, tuple):
            return (final_BTD, *self.output[1:])
        self.output.last_hidden_state = final_BTD
        return self.output


@final
class FrozenStack:
    """A model's own decoder or encoder, run as it is while its blocks are read.

    Args:
        stack: The decoder or encoder; made before its forward is wrapped.
        blocks: From it to its list of blocks.
        embedding: The model's word embedding.

    Attributes:
        num_blocks: How many blocks it has.
    """

    def __init__(self, stack: nn.Module, blocks: str, embedding: nn.Module) -> None:
        listed = cast("nn.ModuleList", stack.get_submodule(blocks))
        watch(listed)
        self.num_blocks = len(listed)
        self._stack = stack
        self._forward = stack.forward
        self._signature = inspect.signature(stack.forward)
        self._embedding = embedding

    @torch.no_grad()
    def run(self, blocks: Sequence[int], args: tuple[Any, ...], kwargs: dict[str, Any]) -> FrozenRun:
        """Call the stack, without a graph, and return what it gave.

        Args:
            blocks: The tapped ones.
            args: What the stack is called with.
            kwargs: Likewise.
        """
        if self._stack.training:
            self._stack.eval()  # as tidelock's frozen blocks are: nothing is dropped out
        given = self._signature.bind(*args, **kwargs).arguments
        with reading() as read:
            output = self._forward(*args, **kwargs)
        embeddings_BTE = given.get("inputs_embeds")
        if embeddings_BTE is None:
            embeddings_BTE = self._embedding(given["input_ids"])
        values = output if isinstance(output, tuple) else tuple(output.values())
        cache = next((value for value in values if isinstance(value, Cache)), None)
        shape_BT = (int(embeddings_BTE.shape[0]), int(embeddings_BTE.shape[1]))
        past = 0 if cache is None else cache.get_seq_length() - shape_BT[1]
        mask_BT = given.get("attention_mask")
        if mask_BT is None:
            mask_BT = torch.ones(shape_BT[0], past + shape_BT[1], dtype=torch.long, device=embeddings_BTE.device)
        return FrozenRun(
            embeddings_NE=embeddings_BTE.flatten(0, 1),
            taps=Taps(tuple(read[block].flatten(0, 1) for block in blocks), values[0].flatten(0, 1)),
            layout=Layout(mask_BT, given.get("position_ids"), None, shape_BT),
            cache=cache,
            past=past,
            given=given,
            output=output,
        )


def beside(cache: Cache, num_blocks: int, fresh: Cache, past: int) -> Cache:
    """Return the layers of a model's cache that hold the side blocks' keys and values, as a cache of their own.

    Args:
        cache: The model's; layers are added to it at its first use.
        num_blocks: How many layers are the model's own.
        fresh: Those that are added.
        past: How many positions they hold.

    Raises:
        ConfigError: The cache cannot take further layers, or was filled without the side network.
    """
    if isinstance(cache, DynamicCache) and len(cache.layers) == num_blocks:
        # Where the model's own layers keep everything, all must: masks are made for the first of each kind.
        cache.layers.extend(fresh.layers if any(cache.is_sliding) else [DynamicLayer() for _ in fresh.layers])
    found = Cache(layers=cache.layers[num_blocks:])
    if not isinstance(cache, DynamicCache) or found.get_seq_length() != past:
        got = "one that was filled without it" if isinstance(cache, DynamicCache) else type(cache).__name__
        msg = (
            f"A cache beside a side network: expected a DynamicCache that was empty when the side network first ran "
            f"with it, got {got}. Leave cache_implementation out, and begin with a new cache."
        )
        raise ConfigError(msg)
    return found
