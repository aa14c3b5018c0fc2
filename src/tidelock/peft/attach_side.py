"""A side network beside an ordinary `transformers` model, for whoever wants a trained one without tidelock.

The forward of the model's decoder is wrapped: it runs as always, without a graph, then the side network reads what its
blocks gave, and the state that goes to the head is the side network's. The model's `generate` does the rest: the side
blocks' keys and values are further layers of its own cache, so that beams are reordered and rows repeated with it. An
encoder hands on the side encoder's state beside its own, as further channels, for the same reason.

Shapes: B rows, T positions, D hidden width, S side width. May import `peft`, `model`, errors and libraries.
"""

from __future__ import annotations

import functools
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn
from transformers import Cache, DynamicCache, EncoderDecoderCache
from transformers.cache_utils import DynamicLayer

from tidelock.errors import ConfigError
from tidelock.model.ends import empty_model
from tidelock.model.frames import Frames
from tidelock.model.frozen_stack import FrozenStack
from tidelock.model.geometry import geometry_of
from tidelock.model.rows import Layout
from tidelock.model.seq2seq import encoder_decoder_family
from tidelock.model.taps import Taps
from tidelock.peft.export import load_adapter
from tidelock.peft.side import SideConfig, SideNetwork
from tidelock.peft.side_files import apply_side
from tidelock.peft.side_seq2seq import SideSeq2Seq

if TYPE_CHECKING:
    import os
    from collections.abc import Sequence

    from transformers import PreTrainedModel
    from transformers.cache_utils import CacheLayerMixin

_NAME = "side_network"


def attach_side(model: PreTrainedModel, folder: str | os.PathLike[str]) -> nn.Module:
    """Put a side network beside an ordinary model, which computes with it from then on, in `generate` too.

    The model's own weights are frozen and its dropout stays off; only the side network, and a head for whole texts,
    can be trained on.

    Args:
        model: The whole model that the side network was trained beside: an `AutoModelForCausalLM` or
            `AutoModelForSeq2SeqLM`, or for an adapter with a head for whole texts an
            `AutoModelForSequenceClassification` with as many labels, whose `score` or `classification_head` becomes
            that head.
        folder: The adapter's, as a side model's `save_adapter` or `tidelock export --to adapter` wrote it.

    Returns:
        The side network, in fp32 on the model's device; also the model's `side_network`, so that it moves with it.

    Raises:
        CheckpointError: The folder has no readable adapter, or it does not fit the model.
        ConfigError: It is no side network, or the model has one already or has no head.
        ModelError: The model's family cannot have one.

    Example::

        model = AutoModelForCausalLM.from_pretrained("HuggingFaceTB/SmolLM2-135M-Instruct")
        tidelock.attach_side(model, "my-run/adapter")
        model.generate(**inputs)
    """
    adapter = load_adapter(Path(folder))
    head = _head_for_texts(model)
    if hasattr(model, _NAME) or (head is None and model.get_output_embeddings() is None):
        got = "one with it" if hasattr(model, _NAME) else type(model).__name__
        msg = (
            "Attaching a side network: expected a causal or sequence-to-sequence model, or a sequence classifier, "
            f"without a side network, got {got} ({folder}). Load such a model anew."
        )
        raise ConfigError(msg)
    if not isinstance(adapter.config, SideConfig):
        msg = (
            f"Attaching a side network: expected one, got an adapter of another method ({folder}). "
            "tidelock.attach_adapter loads serial ones, PeftModel.from_pretrained LoRA."
        )
        raise ConfigError(msg)
    network = _network_for(model, adapter.config)
    apply_side(adapter, network, head)
    model.requires_grad_(requires_grad=False)
    if head is not None:
        head.requires_grad_()
    network.to(next(model.get_input_embeddings().parameters()).device).train(model.training)
    model.add_module(_NAME, network)
    if isinstance(network, SideNetwork):
        _beside_decoder(model, network)
    else:
        _beside_encoder_decoder(model, network)
    return network


def _head_for_texts(model: PreTrainedModel) -> nn.Module | None:
    """Return a sequence classifier's head: a decoder's linear, or an encoder-decoder's own kind."""
    head = getattr(model, "classification_head" if model.config.is_encoder_decoder else "score", None)
    return head if isinstance(head, nn.Module) else None


def _network_for(model: PreTrainedModel, config: SideConfig) -> SideNetwork | SideSeq2Seq:
    if not model.config.is_encoder_decoder:
        # The places of the blocks are the causal model's, whatever head this one has.
        return SideNetwork(config, model.config, geometry_of(empty_model(model.config)))
    family = encoder_decoder_family(model.config)
    encoder, decoder = (len(cast("nn.ModuleList", stack.get_submodule(family.blocks))) for stack in _stacks(model))
    return SideSeq2Seq(config, model.config, (encoder, decoder))


def _stacks(model: PreTrainedModel) -> tuple[nn.Module, nn.Module]:
    """Return the encoder and the decoder of an encoder-decoder, whatever head it has."""
    family = encoder_decoder_family(model.config)
    # T5's sequence classifier has them one level deeper than its language model.
    within = getattr(model, "transformer", model)
    return within.get_submodule(family.encoder), within.get_submodule(family.decoder)


def _beside_decoder(model: PreTrainedModel, network: SideNetwork) -> None:
    """Have the model's decoder give the side network's final state."""
    decoder = model.get_submodule(network.family.decoder)
    frozen = FrozenStack(decoder, network.family.blocks, model.get_input_embeddings())
    weight = next(decoder.parameters())
    frames = Frames(geometry_of(empty_model(model.config)), weight.device, weight.dtype)

    @functools.wraps(decoder.forward)
    def forward(*args: Any, **kwargs: Any) -> Any:  # noqa: ANN401  (as the decoder has it)
        run = frozen.run(network.blocks, args, kwargs)
        fresh = cast("list[CacheLayerMixin]", network.new_cache().layers)
        cache = None if run.cache is None else _further_layers(run.cache, frozen.num_blocks, fresh)
        _check_past(cache, run.past)
        every_N = torch.arange(len(run.embeddings_NE))
        narrow = (
            frames.narrow(block, tap_ND, network.config.tap_width)
            for block, tap_ND in zip(network.blocks, run.taps.blocks, strict=True)
        )
        taps = Taps(tuple(narrow), run.taps.final_MD)
        return run.output_with(network(run.embeddings_NE, taps, run.layout, every_N, cache))

    decoder.forward = forward


def _beside_encoder_decoder(model: PreTrainedModel, network: SideSeq2Seq) -> None:
    """Have the model's encoder hand on the side encoder's state too, and its decoder give the side network's."""
    family, embedding, width = network.family, model.get_input_embeddings(), int(model.config.hidden_size)
    encoder, decoder = _stacks(model)
    frozen_encoder = FrozenStack(encoder, family.blocks, embedding)
    frozen_decoder = FrozenStack(decoder, family.blocks, embedding)

    @functools.wraps(encoder.forward)
    def encode(*args: Any, **kwargs: Any) -> Any:  # noqa: ANN401  (as the encoder has it)
        run = frozen_encoder.run(network.encoder_blocks, args, kwargs)
        side_NS = network.encode(run.embeddings_NE, run.taps.blocks, run.layout).flatten(0, 1)
        return run.output_with(torch.cat([run.taps.final_MD, side_NS.to(run.taps.final_MD)], 1))

    @functools.wraps(decoder.forward)
    def decode(*args: Any, **kwargs: Any) -> Any:  # noqa: ANN401  (as the decoder has it)
        both_BTX = kwargs.pop("encoder_hidden_states")
        _check_source(both_BTX, width + network.side_width)
        frozen_BTD, side_BTS = both_BTX.split([width, network.side_width], dim=-1)
        run = frozen_decoder.run(network.decoder_blocks, args, {**kwargs, "encoder_hidden_states": frozen_BTD})
        cache = None if run.cache is None else _both_further_layers(run.cache, frozen_decoder.num_blocks, network)
        _check_past(cache, run.past)
        mask_BT = run.given.get("encoder_attention_mask")
        if mask_BT is None:
            mask_BT = torch.ones(side_BTS.shape[:2], dtype=torch.long, device=side_BTS.device)
        source = (side_BTS, Layout(mask_BT, None, None, (side_BTS.shape[0], side_BTS.shape[1])))
        every_N = torch.arange(len(run.embeddings_NE))
        return run.output_with(network.decode(run.embeddings_NE, run.taps, run.layout, source, every_N, cache))

    encoder.forward, decoder.forward = encode, decode


def _further_layers(cache: Cache, num_blocks: int, fresh: Sequence[CacheLayerMixin]) -> Cache:
    """Return the layers of a model's cache that hold the side blocks' keys and values, as a cache of their own.

    Args:
        cache: The model's; at its first use it gets further layers, in the place of any that the model never fills:
            T5's generation makes one for each block of the encoder.
        num_blocks: How many layers the model fills.
        fresh: Empty layers for the side blocks.

    Raises:
        ConfigError: The cache cannot take further layers.
    """
    if not isinstance(cache, DynamicCache):
        msg = (
            f"A cache beside a side network: expected a DynamicCache, got {type(cache).__name__}. Leave "
            "cache_implementation out."
        )
        raise ConfigError(msg)
    if len(cache.layers) != num_blocks + len(fresh):
        # Where the model's own layers keep everything, all must: masks are made for the first of each kind.
        cache.layers[num_blocks:] = fresh if any(cache.is_sliding) else [DynamicLayer() for _ in fresh]
        if any(getattr(layer, "record_past", False) for layer in cache.layers):
            cache.activate_past_recording()  # assisted generation takes tokens back
    return Cache(layers=cache.layers[num_blocks:])


def _both_further_layers(cache: Cache, num_blocks: int, network: SideSeq2Seq) -> Cache:
    """Return further layers as `_further_layers` does, for attention to the targets and to the source."""
    pair = cast("EncoderDecoderCache", cache)
    both = (pair.self_attention_cache, pair.cross_attention_cache)
    fresh = [[DynamicLayer() for _ in network.decoder_blocks] for _ in both]
    return EncoderDecoderCache(*map(_further_layers, both, [num_blocks] * 2, fresh))


def _check_past(cache: Cache | None, past: int) -> None:
    """Refuse a cache whose tokens the side blocks have not seen."""
    if cache is not None and cache.get_seq_length() != past:
        msg = (
            f"A cache beside a side network: expected one that was empty when the side network first ran with it, got "
            f"one with {past} positions that it has not seen. Begin with a new cache."
        )
        raise ConfigError(msg)


def _check_source(state_BTX: Tensor, width: int) -> None:
    """Refuse what another encoder gave."""
    if state_BTX.shape[-1] != width:
        msg = (
            f"The encoder's output beside a side network: expected {width} channels, the side encoder's among them, "
            f"got {state_BTX.shape[-1]}. Have this model's own encoder make it, with the side network attached."
        )
        raise ConfigError(msg)
