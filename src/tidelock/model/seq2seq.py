"""Encoder-decoder models, whole and frozen in this process: their facts, taps of both stacks, and their ends.

Only side networks are trained beside them, so nothing is cut: hooks read the blocks' outputs while the model's own
stacks run, without any graph.

Shapes: N real tokens of the source, K of the target, M selected ones, D hidden width, V vocabulary.
May import errors, `model` and libraries.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, cast, final

import torch
from torch import Tensor, nn

from tidelock.errors import ModelError
from tidelock.model.call import call_decoder
from tidelock.model.ends import GivenState, empty_model, load_ends, read_as
from tidelock.model.taps import Taps
from tidelock.model.watch import reading, watch

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence
    from pathlib import Path

    from transformers import Cache, PretrainedConfig, PreTrainedModel

    from tidelock.model.checkpoint import TensorSource
    from tidelock.model.rows import Rows


@final
@dataclass(frozen=True, slots=True)
class EncoderDecoderFamily:
    """Where the parts of an encoder-decoder are, as attribute paths.

    Attributes:
        name: `config.model_type`.
        encoder: From the model with a language-model head to its encoder.
        decoder: And to its decoder.
        blocks: From either to its list of blocks.
        shared: A parameter that only the first block of a stack has and that all its blocks read: from the block.
    """

    name: str
    encoder: str
    decoder: str
    blocks: str
    shared: str | None = None


# Of BART: added to the logits.
_BIAS = "final_logits_bias"

ENCODER_DECODERS: dict[str, EncoderDecoderFamily] = {
    family.name: family
    for family in (
        EncoderDecoderFamily(
            "t5", "encoder", "decoder", "block", "layer.0.SelfAttention.relative_attention_bias.weight"
        ),
        EncoderDecoderFamily("bart", "model.encoder", "model.decoder", "layers"),
    )
}


def encoder_decoder_family(config: PretrainedConfig) -> EncoderDecoderFamily:
    """Return the facts about an encoder-decoder's family.

    Raises:
        ModelError: It is not in the table.
    """
    family = ENCODER_DECODERS.get(config.model_type)
    if family is None:
        msg = (
            f"A side network for a model of type {config.model_type!r}: expected a decoder or one of the "
            f"encoder-decoders {', '.join(sorted(ENCODER_DECODERS))}, got another. Use one of those."
        )
        raise ModelError(msg)
    return family


def stack_sizes(model: PreTrainedModel, family: EncoderDecoderFamily) -> tuple[int, int]:
    """Return how many blocks the encoder has, and the decoder."""
    encoder, decoder = (
        len(cast("nn.ModuleList", model.get_submodule(f"{path}.{family.blocks}")))
        for path in (family.encoder, family.decoder)
    )
    return encoder, decoder


@final
class FrozenSeq2Seq:
    """A frozen encoder-decoder whose blocks can be tapped; safe to use from several threads at once.

    Args:
        model: The whole model with its language-model head. It is put in eval mode and frozen.

    Raises:
        ModelError: Its family is not known.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        model.eval().requires_grad_(requires_grad=False)
        self.family = encoder_decoder_family(model.config)
        self.config = model.config
        self.encoder = model.get_submodule(self.family.encoder)
        self.decoder = model.get_submodule(self.family.decoder)
        for stack in (self.encoder, self.decoder):
            watch(cast("nn.ModuleList", stack.get_submodule(self.family.blocks)))

    def encode(self, embeddings_NE: Tensor, rows: Rows, blocks: Sequence[int]) -> Taps:
        """Return the encoder's taps; their final state is the encoder's, at every token."""
        return self._run(self.encoder, embeddings_NE, rows, blocks)

    def decode(
        self,
        embeddings_KE: Tensor,
        rows: Rows,
        source: tuple[Tensor, Rows],
        blocks: Sequence[int],
        cache: Cache | None = None,
    ) -> Taps:
        """Return the decoder's taps at the tokens that it is given (teacher forcing).

        Args:
            embeddings_KE: Word embeddings of the decoder's inputs.
            rows: Where they are; with a filled cache, where the first ones were.
            source: The encoder's final state, shape (N, D), and where its tokens are.
            blocks: The tapped blocks of the decoder.
            cache: Keys and values of the targets before these, and of the source, extended in place. When it holds
                some, there is one target more in every row.
        """
        state_ND, source_rows = source
        layout = source_rows.layout(self.device)
        return self._run(
            self.decoder,
            embeddings_KE,
            rows,
            blocks,
            {
                "encoder_hidden_states": layout.unpack(state_ND.to(self.device)),
                "encoder_attention_mask": layout.mask,
            },
            cache,
        )

    @torch.no_grad()
    def _run(
        self,
        stack: nn.Module,
        embeddings_NE: Tensor,
        rows: Rows,
        blocks: Sequence[int],
        more: Mapping[str, Tensor] | None = None,
        cache: Cache | None = None,
    ) -> Taps:
        past = 0 if cache is None else cache.get_seq_length()
        layout = rows.next_layout(past, self.device) if past else rows.layout(self.device)
        dtype = next(stack.parameters()).dtype
        with reading() as read:
            final_BTD = call_decoder(
                stack, layout.unpack(embeddings_NE.to(self.device, dtype)), layout, cache=cache, more=more
            )
        return Taps(tuple(layout.pack(read[block]) for block in blocks), layout.pack(final_BTD))

    @property
    def device(self) -> torch.device:
        """Where the frozen stacks are."""
        return next(self.encoder.parameters()).device


@final
class Seq2SeqEnds:
    """An encoder-decoder's word embedding and head, which do not keep the blocks alive.

    Args:
        model: The whole model; of its blocks none need be loaded.
        folder: Where its configuration and the tokenizer's files are.

    Attributes:
        config: The model's configuration.
        folder: As given.
        width: Numbers per token of the embedding and of the state that the head reads.
        num_blocks: How many blocks its encoder and its decoder have.
        max_positions: The most positions that the model was made for, where there is a limit.
    """

    def __init__(self, model: PreTrainedModel, folder: Path) -> None:
        family = encoder_decoder_family(model.config)
        self.config = model.config
        self.folder = folder
        self.width: int = model.config.hidden_size
        self.max_positions: int | None = getattr(model.config, "max_position_embeddings", None)
        self.num_blocks = stack_sizes(model, family)
        self._embedding = model.get_input_embeddings().eval().requires_grad_(requires_grad=False)
        without_encoder = _with_stub(model, family.encoder)
        # The model's own forward around a stub, so that T5's scaling and BART's bias are done.
        self._head_model = cast("Any", _with_stub(without_encoder, family.decoder))
        self._head_model.eval().requires_grad_(requires_grad=False)

    @classmethod
    def read(cls, config: PretrainedConfig, source: TensorSource) -> Seq2SeqEnds:
        """Return the ends of a stored model, of which no more is read.

        Raises:
            ModelError: Its family is not known, or a tensor of the ends is missing or has the wrong shape.
        """
        encoder_decoder_family(config)
        model = empty_model(config)
        load_ends(model, source)
        bias = dict(model.named_buffers()).get(_BIAS)
        if bias is not None and _BIAS in source.names():
            model.register_buffer(_BIAS, read_as(source, _BIAS, bias.shape))
        return cls(model, source.folder)

    def to(self, device: torch.device) -> None:
        """Move both ends."""
        self._embedding.to(device)
        self._head_model.to(device)

    @property
    def embedding(self) -> Tensor:
        """The word embedding's weight, of shape (V, D)."""
        return self._embedding.get_parameter("weight")

    def weights(self) -> Iterator[Tensor]:
        """Yield the weights of both ends."""
        yield self.embedding
        yield from self._head_model.parameters()

    @torch.no_grad()
    def embed(self, ids: Tensor) -> Tensor:
        """Return word embeddings, shape (*ids.shape, D)."""
        return cast("Tensor", self._embedding(ids))

    def logits(self, final_MD: Tensor) -> Tensor:
        """Return the head's logits, shape (M, V), fp32; differentiable in the state."""
        state = final_MD[None]
        output = self._head_model(encoder_outputs=(state,), decoder_inputs_embeds=state, use_cache=False)
        return cast("Tensor", output.logits[0]).float()

    def decoder_ids(self, labels_BT: Tensor) -> Tensor:
        """Return the ids that the decoder is given to predict these labels: shifted, with the start id first."""
        return cast("Tensor", self._head_model.prepare_decoder_input_ids_from_labels(labels_BT))


def _with_stub(module: nn.Module, path: str) -> nn.Module:
    """Return a copy of a module that shares everything with it but has a stub at a path."""
    name, _, rest = path.partition(".")
    child = _with_stub(module.get_submodule(name), rest) if rest else GivenState()
    shallow = copy.copy(module)
    shallow.__dict__["_modules"] = {**module._modules, name: child}  # noqa: SLF001
    return shallow
