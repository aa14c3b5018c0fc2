"""The side method for encoder-decoders: text to text, with labels as their own causal models take them.

A sibling of `device.side_model`. The frozen model runs in this process; no gradient goes through it.

Shapes: B rows, T positions of the source, N its real tokens, K tokens of the target, D hidden width, V vocabulary.
May import `backbone`, `peft`, `model`, `device` and libraries.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol, cast, final

import torch
from torch import Tensor, nn
from transformers import DynamicCache, EncoderDecoderCache, GenerationConfig
from transformers.modeling_outputs import Seq2SeqLMOutput

from tidelock.device.causal_lm import packed_ids, read_rows, spread
from tidelock.device.generate import GenerationSettings, choose_tokens, stop_ids
from tidelock.device.loss import causal_loss
from tidelock.errors import ConfigError
from tidelock.model.rows import Rows
from tidelock.peft.side_files import apply_side, save_side
from tidelock.peft.side_seq2seq import SideSeq2Seq

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from transformers import Cache, PretrainedConfig

    from tidelock.model.rows import Layout
    from tidelock.model.seq2seq import Seq2SeqEnds
    from tidelock.model.taps import Taps
    from tidelock.peft.adapter_files import Adapter
    from tidelock.peft.side import SideConfig

_IGNORED = -100


class Seq2SeqTapSource(Protocol):
    """Where the taps of an encoder-decoder come from; see `model.seq2seq.FrozenSeq2Seq`, which is one.

    Attributes:
        num_blocks: How many blocks its encoder and its decoder have.
    """

    num_blocks: tuple[int, int]

    def encode(self, embeddings_NE: Tensor, rows: Rows, blocks: Sequence[int]) -> Taps:
        """Return the encoder's taps and its final state at every token."""
        ...

    def decode(
        self,
        embeddings_KE: Tensor,
        rows: Rows,
        source: tuple[Tensor, Rows],
        blocks: Sequence[int],
        cache: Cache | None = None,
    ) -> Taps:
        """Return the decoder's taps and its final state at every token that it is given; a cache is extended."""
        ...


@final
class SideSeq2SeqModel(nn.Module):
    """An encoder-decoder whose side network is trained beside its frozen blocks.

    Args:
        ends: The model's embedding and head.
        source: Gives the frozen blocks' outputs.
        config: What the side network is like.

    Attributes:
        config: The model's Hugging Face configuration.
        generation_config: How the model's makers would have it generate.
        side_config: As given.
        network: The side network.

    Raises:
        ConfigError: The configuration names blocks that a stack does not have.
        ModelError: The family is not known, or its class does not take the reduced widths.
    """

    # Read by `transformers.Trainer`: our loss divides by `num_items_in_batch`.
    accepts_loss_kwargs = True

    def __init__(self, ends: Seq2SeqEnds, source: Seq2SeqTapSource, config: SideConfig) -> None:
        super().__init__()
        self.config: PretrainedConfig = ends.config
        self.generation_config = GenerationConfig.from_model_config(ends.config)
        self.ends = ends
        self.source = source
        self.side_config = config
        self.network = SideSeq2Seq(config, ends.config, source.num_blocks)

    @property
    def device(self) -> torch.device:
        """Where the side network, the embedding and the head are."""
        return next(self.parameters()).device

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        labels: Tensor | None = None,
        num_items_in_batch: Tensor | int | None = None,
        **kwargs: Any,
    ) -> Seq2SeqLMOutput:
        """Return the loss and the logits of the targets, each predicted from those before it.

        Args:
            input_ids: Source ids, int64 of shape (B, T).
            attention_mask: 1 at real tokens, shape (B, T); None means that all are real.
            labels: Target ids, shape (B, targets), -100 at padding, which is on the right.
            num_items_in_batch: What the summed loss is divided by; None means the number of targets.
            **kwargs: Arguments of Hugging Face models that change nothing here (`use_cache=False`, ...).

        Returns:
            `logits` of shape (B, targets, V), fp32, zero at padding.

        Raises:
            ConfigError: A row has padding in its middle or no target, or an argument is missing or unknown.
            NonFiniteError: The loss is infinite or not a number.
        """
        ids_BT, rows = self._read_source(input_ids, attention_mask, kwargs)
        targets = _target_rows(labels, len(rows.lengths))
        labels_BT = cast("Tensor", labels).to(self.device)
        decoder_ids_K = packed_ids(self.ends.decoder_ids(labels_BT), targets)
        source = self._encode(ids_BT, rows)
        select_K = torch.arange(targets.num_tokens)
        final_KD = self.decode(self.ends.embed(decoder_ids_K), targets, source, select_K)
        logits_KV = self.ends.logits(final_KD)
        loss = causal_loss(logits_KV, packed_ids(labels_BT, targets), num_items_in_batch)
        return Seq2SeqLMOutput(loss=loss, logits=spread(logits_KV, targets, select_K, labels_BT.shape[1]))

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
        settings = settings or GenerationSettings()
        ids_BT, rows = self._read_source(input_ids, attention_mask, {})
        any_label_B1 = torch.zeros(len(ids_BT), 1, dtype=torch.long, device=self.device)
        start_BE = self.ends.embed(self.ends.decoder_ids(any_label_B1)[:, 0])
        run = _Generation(self, self._encode(ids_BT, rows), start_BE)
        stops = stop_ids(self.generation_config, settings)
        return torch.stack(list(choose_tokens(run, self.ends, stops, self.device, settings)), 1)

    def _read_source(
        self, input_ids: Tensor | None, attention_mask: Tensor | None, kwargs: dict[str, Any]
    ) -> tuple[Tensor, Rows]:
        limit = getattr(self.config, "max_position_embeddings", None)
        rows = read_rows(input_ids, attention_mask, kwargs, limit)
        self.ends.to(self.device)
        return cast("Tensor", input_ids).to(self.device), rows

    def _encode(self, ids_BT: Tensor, rows: Rows) -> _Source:
        embeddings_NE = self.ends.embed(packed_ids(ids_BT, rows))
        taps = self.source.encode(embeddings_NE, rows, self.network.encoder_blocks)
        layout = rows.layout(self.device)
        return _Source(taps.final_MD, rows, self.network.encode(embeddings_NE, taps, layout), layout)

    def decode(
        self,
        embeddings_KE: Tensor,
        targets: Rows,
        source: _Source,
        select_M: Tensor,
        caches: tuple[Cache, Cache] | None = None,
    ) -> Tensor:
        """Return the states that the head reads at the selected targets, shape (M, D).

        Args:
            embeddings_KE: Word embeddings of the decoder's inputs.
            targets: Where they are; with filled caches, where the first ones were.
            source: What both encoders made of the source.
            select_M: Which of the K tokens are wanted, int64.
            caches: Keys and values of the frozen blocks and of the side blocks, extended in place.
        """
        frozen, side = (None, None) if caches is None else caches
        past = 0 if side is None else side.get_seq_length()
        layout = targets.next_layout(past, self.device) if past else targets.layout(self.device)
        blocks = self.network.decoder_blocks
        taps = self.source.decode(embeddings_KE, targets, (source.frozen_ND, source.rows), blocks, frozen)
        return self.network.decode(embeddings_KE, taps, layout, (source.side_BTS, source.layout), select_M, side)

    def save_adapter(self, folder: Path, base_model: str | None = None) -> None:
        """Write the side network as an adapter; see `peft.side_files`.

        Args:
            folder: Made when it is not there.
            base_model: Folder or hub name of the model, for whoever loads the adapter; None takes the configuration's.

        Raises:
            StorageError: The file system refused.
        """
        base_model = base_model or str(self.config.name_or_path)
        save_side(self.network, None, self.side_config, folder, base_model=base_model)

    def load_adapter(self, adapter: Adapter) -> None:
        """Copy an adapter's weights into the side network, which was made from its configuration.

        Raises:
            CheckpointError: Its tensors are not those of the network.
        """
        apply_side(adapter, self.network, None)


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
        self.final_BD = self._model.decode(embeddings_BE, start, self._source, torch.arange(count), self._caches)
        return self.final_BD

    def close(self) -> None:
        """Free all keys and values."""
        self._caches = self._new_caches()

    def _new_caches(self) -> tuple[Cache, Cache]:
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
