"""The side method for encoder-decoders: text to text, or a label for a whole text.

A sibling of `device.side_model`. No gradient goes through the frozen stacks. As in transformers' own classifiers of
these families, the decoder of a model for whole texts is given the source, and its state at the last token goes to the
head.

Shapes: B rows, T positions of the source, N its real tokens, K tokens of the target, M selected ones, D hidden width,
V vocabulary, C classes.
May import `backbone`, `peft`, `model`, `device` and libraries.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, cast, final

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence
from transformers import AutoModelForSequenceClassification, DynamicCache, EncoderDecoderCache
from transformers.modeling_outputs import Seq2SeqLMOutput, SequenceClassifierOutput

from tidelock.device.beside_blocks import BesideBlocks
from tidelock.device.causal_lm import packed_ids, read_rows, spread
from tidelock.device.generate import GenerationSettings, choose_tokens, stop_ids
from tidelock.device.loss import causal_loss, last_tokens
from tidelock.errors import ConfigError
from tidelock.model.rows import Rows
from tidelock.model.taps import Taps
from tidelock.peft.side_seq2seq import SideSeq2Seq

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from transformers import Cache, PretrainedConfig

    from tidelock.backbone.protocol import Seq2SeqBackbone
    from tidelock.device.tap_source import ExampleIds, TapSource
    from tidelock.model.rows import Layout
    from tidelock.model.seq2seq import Seq2SeqEnds
    from tidelock.peft.side import SideConfig

_IGNORED = -100


@final
class SideSeq2SeqModel(BesideBlocks):
    """An encoder-decoder whose side network is trained beside its frozen blocks.

    Args:
        ends: The model's embedding and head.
        source: Gives the frozen blocks' outputs.
        config: What the side network is like.
        num_labels: Classes of whole texts, 1 for a number; the family's own head for them is trained too. None is a
            model of text to text.

    Raises:
        ConfigError: The configuration names blocks that a stack does not have.
        ModelError: The family is not known, or its class does not take the reduced widths.
    """

    network: SideSeq2Seq
    ends: Seq2SeqEnds
    source: TapSource[Seq2SeqBackbone]
    # As they are learned from: BART counts positions from the first column.
    padding_side = "right"

    def __init__(
        self,
        ends: Seq2SeqEnds,
        source: TapSource[Seq2SeqBackbone],
        config: SideConfig,
        *,
        num_labels: int | None = None,
    ) -> None:
        super().__init__(ends, source, SideSeq2Seq(config, ends.config, ends.num_blocks), num_labels)
        self.head = None if num_labels is None else fresh_classification_head(ends.config, num_labels)

    @property
    def tapped(self) -> tuple[int, ...]:
        """The blocks that are read, by number; those of the decoder are numbered after those of the encoder."""
        encoder, _ = self.ends.num_blocks
        return (*self.network.encoder_blocks, *(encoder + block for block in self.network.decoder_blocks))

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        labels: Tensor | None = None,
        num_items_in_batch: Tensor | int | None = None,
        **kwargs: Any,
    ) -> Seq2SeqLMOutput | SequenceClassifierOutput:
        """Return the loss and the logits of the targets, each predicted from those before it.

        Args:
            input_ids: Source ids, int64 of shape (B, T).
            attention_mask: 1 at real tokens, shape (B, T); None means that all are real.
            labels: Target ids, shape (B, targets), -100 at padding, which is on the right. With a head for whole texts
                one class or number a row, shape (B,), or None.
            num_items_in_batch: What the summed loss is divided by; None means the number of targets.
            **kwargs: Arguments of Hugging Face models that change nothing here (`use_cache=False`, ...).

        Returns:
            `logits` of shape (B, targets, V), fp32, zero at padding. With a head for whole texts, of shape (B, C).

        Raises:
            ConfigError: A row has padding in its middle or no target, an argument is missing or unknown, or the network
                has not begun as its configuration says.
            NonFiniteError: The loss is infinite or not a number.
        """
        self._require_start()
        batch = self._open_batch(input_ids, attention_mask, labels, kwargs)
        final_MD = self._final_states(batch)
        if self.head is not None:
            return self._texts_output(self.head, final_MD, labels, num_items_in_batch)
        logits_KV = self.ends.logits(final_MD)
        loss = causal_loss(logits_KV, packed_ids(batch.labels_BK, batch.targets), num_items_in_batch)
        width = batch.labels_BK.shape[1]
        return Seq2SeqLMOutput(loss=loss, logits=spread(logits_KV, batch.targets, batch.select_M, width))

    def targets_of(self, labels: Tensor) -> Tensor:
        """Return the labels that have a loss: all of them."""
        return labels

    @torch.no_grad()
    def generate(
        self, input_ids: Tensor, attention_mask: Tensor | None = None, settings: GenerationSettings | None = None
    ) -> Tensor:
        """Return the answers to sources, int64 of shape (B, new tokens), without the start id.

        Args:
            input_ids: Sources, shape (B, T).
            attention_mask: 1 at real tokens; None means that all are real.
            settings: How tokens are chosen and when to stop. A finished row repeats its stop id.
        """
        return torch.stack(list(self.stream(input_ids, attention_mask, settings)), 1)

    @torch.no_grad()
    def stream(
        self, input_ids: Tensor, attention_mask: Tensor | None = None, settings: GenerationSettings | None = None
    ) -> Iterator[Tensor]:
        """Yield the answers token by token, each int64 of shape (B,); arguments as for `generate`."""
        settings = settings or GenerationSettings()
        ids_BT, rows = self._read_source(input_ids, attention_mask, {})
        any_label_B1 = torch.zeros(len(ids_BT), 1, dtype=torch.long, device=self.device)
        start_BE = self.ends.embed(self.ends.decoder_ids(any_label_B1)[:, 0])
        embeddings_NE = self.ends.embed(packed_ids(ids_BT, rows))
        taps = self.source.blocks().encode(embeddings_NE, rows, self.network.encoder_blocks)
        layout = rows.layout(self.device)
        side_BTS = self.network.encode(embeddings_NE, taps.blocks, layout)
        run = _Generation(self, _Source(taps.final_MD, rows, side_BTS, layout), start_BE)
        yield from choose_tokens(run, self.ends, stop_ids(self.generation_config, settings), self.device, settings)

    def examples_of(self, batch: Mapping[str, Tensor]) -> list[ExampleIds]:
        """Return for each row of a batch its source's ids; its decoder's; where it begins, and which are selected.

        Args:
            batch: What `forward` takes.
        """
        return self._open_batch(batch["input_ids"], batch.get("attention_mask"), batch.get("labels"), {}).examples

    def tap_shapes(self, example: ExampleIds) -> list[tuple[int, int]]:
        """Return the shapes (tokens, width) of what a cache keeps: taps, and the decoder's final states."""
        source, target, (_, *selected) = example
        width = self.ends.width
        return [
            *([(len(source), width)] * len(self.network.encoder_blocks)),
            *([(len(target), width)] * len(self.network.decoder_blocks)),
            (len(selected), width),
        ]

    def read_taps(self, batch: Mapping[str, Tensor]) -> None:
        """Have the taps of a batch that are new computed and cached; the side network is not asked.

        Args:
            batch: What `forward` takes.
        """
        self._read(self._open_batch(batch["input_ids"], batch.get("attention_mask"), batch.get("labels"), {}))

    def decode(
        self, embeddings_BE: Tensor, start: Rows, source: _Source, caches: tuple[EncoderDecoderCache, Cache]
    ) -> Tensor:
        """Return the states that the head reads of one more target in each row, shape (B, D).

        Args:
            embeddings_BE: Word embeddings of the decoder's inputs.
            start: Where the first of them were.
            source: What both encoders made of the source.
            caches: Keys and values of the frozen blocks and of the side blocks, extended in place.
        """
        frozen, side = caches
        past = side.get_seq_length()
        layout = start.next_layout(past, self.device) if past else start.layout(self.device)
        blocks, given = self.network.decoder_blocks, (source.frozen_ND, source.rows)
        taps = self.source.blocks().decode(embeddings_BE, start, given, blocks, frozen)
        select_B = torch.arange(len(embeddings_BE))
        return self.network.decode(embeddings_BE, taps, layout, (source.side_BTS, source.layout), select_B, side)

    def _read_source(
        self, input_ids: Tensor | None, attention_mask: Tensor | None, kwargs: dict[str, Any]
    ) -> tuple[Tensor, Rows]:
        rows = read_rows(input_ids, attention_mask, kwargs, self.ends.max_positions)
        self.ends.to(self.device)
        return cast("Tensor", input_ids).to(self.device), rows

    def _open_batch(
        self, input_ids: Tensor | None, attention_mask: Tensor | None, labels: Tensor | None, kwargs: dict[str, Any]
    ) -> _Batch:
        ids_BT, rows = self._read_source(input_ids, attention_mask, kwargs)
        ids_N = packed_ids(ids_BT, rows)
        if self.head is not None:
            # What the decoder is given is the source, and "predicts" it: only its state is used.
            labels_BK = pad_sequence(list(ids_N.split(rows.lengths)), batch_first=True, padding_value=_IGNORED)
            targets = _target_rows(labels_BK, len(rows.lengths))
            select_M = last_tokens(targets)
        else:
            targets = _target_rows(labels, len(rows.lengths))
            labels_BK = cast("Tensor", labels).to(self.device)
            select_M = torch.arange(targets.num_tokens)
        decoder_ids_K = packed_ids(self.ends.decoder_ids(labels_BK), targets)
        return _Batch(rows, targets, labels_BK, select_M, ids_N, decoder_ids_K)

    def _final_states(self, batch: _Batch) -> Tensor:
        encoder_taps, decoder_taps = self._read(batch)
        source_layout, target_layout = batch.rows.layout(self.device), batch.targets.layout(self.device)
        side_BTS = self.network.encode(self.ends.embed(batch.ids_N), encoder_taps, source_layout)
        embeddings_KE = self.ends.embed(batch.decoder_ids_K)
        source = (side_BTS, source_layout)
        return self.network.decode(embeddings_KE, decoder_taps, target_layout, source, batch.select_M)

    def _read(self, batch: _Batch) -> tuple[list[Tensor], Taps]:
        """Return the encoder's taps, and the decoder's with its final states at the selected tokens."""
        encoder_blocks, decoder_blocks = self.network.encoder_blocks, self.network.decoder_blocks
        examples = batch.examples

        def compute(backbone: Seq2SeqBackbone, number: int) -> tuple[Tensor, ...]:
            source, target, (start, *select) = examples[number]
            rows, targets = (
                Rows((begin,), (len(ids),), begin + len(ids)) for begin, ids in ((start, source), (0, target))
            )
            embeddings_NE, embeddings_KE = (self.ends.embed(self._as_tensor(ids)) for ids in (source, target))
            encoded = backbone.encode(embeddings_NE, rows, encoder_blocks)
            decoded = backbone.decode(embeddings_KE, targets, (encoded.final_MD, rows), decoder_blocks)
            return (*encoded.blocks, *decoded.blocks, decoded.final_MD[select])

        parts = self.source.read(examples, compute)
        *taps, final_MD = (torch.cat(tensors) for tensors in zip(*parts, strict=True))
        count = len(encoder_blocks)
        return taps[:count], Taps(tuple(taps[count:]), final_MD)

    def _as_tensor(self, ids: tuple[int, ...]) -> Tensor:
        return torch.tensor(ids, device=self.device)


@final
@dataclass(frozen=True, slots=True)
class _Batch:
    """A batch as the stacks are given it.

    Attributes:
        rows: Where the source's tokens are.
        targets: Where the decoder's are.
        labels_BK: What the decoder's tokens predict, -100 at padding.
        select_M: Which of the decoder's tokens are wanted, ascending.
        ids_N: The source's ids.
        decoder_ids_K: The decoder's.
    """

    rows: Rows
    targets: Rows
    labels_BK: Tensor
    select_M: Tensor
    ids_N: Tensor
    decoder_ids_K: Tensor

    @property
    def examples(self) -> list[ExampleIds]:
        """What the taps of each row depend on."""
        ends_B = torch.tensor(self.targets.lengths).cumsum(0)
        selects = self.select_M.tensor_split(torch.searchsorted(self.select_M, ends_B)[:-1])
        return [
            (tuple(source.tolist()), tuple(target.tolist()), (start, *(select - (end - len(target))).tolist()))
            for source, target, start, select, end in zip(
                self.ids_N.split(self.rows.lengths),
                self.decoder_ids_K.split(self.targets.lengths),
                self.rows.starts,
                selects,
                ends_B,
                strict=True,
            )
        ]


@final
@dataclass(frozen=True, slots=True)
class _Source:
    """What both encoders made of the source.

    Attributes:
        frozen_ND: The frozen encoder's final state.
        rows: Where its tokens are.
        side_BTS: The side encoder's final state.
        layout: How it lies in the padded batch.
    """

    frozen_ND: Tensor
    rows: Rows
    side_BTS: Tensor
    layout: Layout


@final
class _Generation:
    """Targets that grow by one token at a time, with keys and values kept; see `backbone.protocol.Generation`."""

    def __init__(self, model: SideSeq2SeqModel, source: _Source, start_BE: Tensor) -> None:
        self._model = model
        self._source = source
        self._caches = self._new_caches()
        self.final_BD = self.extend(start_BE)

    def extend(self, embeddings_BE: Tensor) -> Tensor:
        """Return the final states of the last token of each row, shape (B, D), with one more token in each."""
        count = len(embeddings_BE)
        start = Rows((0,) * count, (1,) * count, 1)
        self.final_BD = self._model.decode(embeddings_BE, start, self._source, self._caches)
        return self.final_BD

    def close(self) -> None:
        """Free all keys and values."""
        self._caches = self._new_caches()

    def _new_caches(self) -> tuple[EncoderDecoderCache, Cache]:
        return EncoderDecoderCache(DynamicCache(), DynamicCache()), self._model.network.new_cache()


def _target_rows(labels_BT: Tensor | None, count: int) -> Rows:
    """Return where the targets are, once they are checked."""
    if labels_BT is None or labels_BT.dim() != 2 or len(labels_BT) != count:
        got = "none" if labels_BT is None else f"shape {tuple(labels_BT.shape)}"
        msg = f"Labels: expected target ids of two axes, {count} rows like the sources', got {got}. Give one row each."
        raise ConfigError(msg)
    mask_BT = (labels_BT != _IGNORED).cpu()
    lengths_B = mask_BT.sum(1)
    bad = (mask_BT != (torch.arange(mask_BT.shape[1]) < lengths_B[:, None])).any(1) | (lengths_B == 0)
    if bool(bad.any()):
        msg = (
            f"Labels: expected at least one target in every row, and {_IGNORED} only to the right of its targets, got "
            f"something else (row {int(bad.int().argmax())}). Pad targets on the right."
        )
        raise ConfigError(msg)
    return Rows((0,) * count, tuple(lengths_B.tolist()), int(lengths_B.max()))


def fresh_classification_head(config: PretrainedConfig, num_labels: int) -> nn.Module:
    """Return a new head for whole texts, as the family's own classifier has it and begins it."""
    small = copy.deepcopy(config)
    # Only the head is kept, whose size these do not change.
    for name in ("num_layers", "num_decoder_layers", "encoder_layers", "decoder_layers"):
        if hasattr(small, name):
            setattr(small, name, 1)
    small.vocab_size, small.pad_token_id, small.num_labels = 1, 0, num_labels
    model = AutoModelForSequenceClassification.from_config(small, dtype=torch.float32)
    return cast("nn.Module", model.get_submodule("classification_head"))
