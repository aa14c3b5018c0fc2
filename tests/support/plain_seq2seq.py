"""Tiny encoder-decoders, and the oracle of the side method for them: the whole model in one graph, with hooks.

As `tests.support.plain_side` for decoders: hooks on every frozen block, side layers called through a wrapper that
mixes, and a hook on the frozen decoder that puts the side network's output in the place of its own.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast, final

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForSeq2SeqLM, AutoModelForSequenceClassification, PreTrainedModel
from transformers.modeling_outputs import Seq2SeqLMOutput

from tests.support.tiny_models import VOCAB, randomise
from tidelock.backbone.local_seq2seq import LocalSeq2Seq
from tidelock.backbone.protocol import Seq2SeqBackbone
from tidelock.device.side_seq2seq import SideSeq2SeqModel
from tidelock.device.tap_source import TapSource
from tidelock.model.seq2seq import FrozenSeq2Seq, Seq2SeqEnds
from tidelock.peft.side import SideConfig

ENCODER_BLOCKS, DECODER_BLOCKS = 4, 3
_T5 = {
    "vocab_size": VOCAB,
    "d_model": 32,
    "d_kv": 8,
    "d_ff": 48,
    "num_layers": ENCODER_BLOCKS,
    "num_decoder_layers": DECODER_BLOCKS,
    "num_heads": 4,
    "relative_attention_num_buckets": 8,
    "relative_attention_max_distance": 12,
    "dropout_rate": 0.0,
    "decoder_start_token_id": 0,
}
_BART = {
    "vocab_size": VOCAB,
    "d_model": 32,
    "encoder_layers": ENCODER_BLOCKS,
    "decoder_layers": DECODER_BLOCKS,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 48,
    "decoder_ffn_dim": 40,
    "max_position_embeddings": 64,
    "dropout": 0.0,
    "forced_eos_token_id": None,
}
TINY_SEQ2SEQ: dict[str, tuple[str, dict[str, Any]]] = {
    "t5": ("t5", _T5),
    "t5_gated": ("t5", {**_T5, "feed_forward_proj": "gated-gelu", "tie_word_embeddings": False}),
    "bart": ("bart", _BART),
    "bart_scaled": ("bart", {**_BART, "scale_embedding": True}),
}


def tiny_seq2seq(name: str, **changes: Any) -> PreTrainedModel:
    """Return a random encoder-decoder, the same every time, BART's bias on the logits included."""
    model_type, settings = TINY_SEQ2SEQ[name]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(7)
        model: PreTrainedModel = AutoModelForSeq2SeqLM.from_config(
            AutoConfig.for_model(model_type, **{**settings, **changes})
        )
        randomise(model)
        for buffer in model.buffers():
            if buffer.is_floating_point():
                buffer.normal_()
    model.eval()
    return model


def tiny_classifier(name: str, num_labels: int) -> PreTrainedModel:
    """Return transformers' own classifier with the weights of the random encoder-decoder, and a random head."""
    whole = tiny_seq2seq(name)
    config = copy.deepcopy(whole.config)
    config.num_labels = num_labels
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(8)
        model: PreTrainedModel = AutoModelForSequenceClassification.from_config(config)
    weights = {
        (key if name.startswith("bart") else f"transformer.{key}"): value
        for key, value in whole.state_dict().items()
        if not key.startswith(("lm_head", "final_logits_bias"))
    }
    missing, unexpected = model.load_state_dict(weights, strict=False)
    assert not unexpected
    assert all(key.startswith("classification_head.") for key in missing)
    model.eval()
    return model


def side_seq2seq(model: PreTrainedModel, config: SideConfig, num_labels: int | None = None) -> SideSeq2SeqModel:
    """Return a side model beside a copy of an encoder-decoder."""
    model = copy.deepcopy(model)
    source: TapSource[Seq2SeqBackbone] = TapSource(lambda: LocalSeq2Seq(FrozenSeq2Seq(model)))
    return SideSeq2SeqModel(Seq2SeqEnds(model, Path("here")), source, config, num_labels=num_labels)


@final
class PlainSideSeq2Seq(nn.Module):
    """The whole model with a side network that has the same parameters, under the same names, as a side model's."""

    whole: PreTrainedModel

    def __init__(self, model: PreTrainedModel, like: SideSeq2SeqModel) -> None:
        super().__init__()
        # Not a submodule: its parameters are none of the side network's.
        self.__dict__["whole"] = copy.deepcopy(model).requires_grad_(requires_grad=False)
        self.network = copy.deepcopy(like.network)
        self._masks: dict[str, Tensor] = {}
        self._outputs: dict[str, Tensor] = {}
        family = like.network.family
        decoder = self.whole.get_submodule(family.decoder)
        for name, path, tapped, side in (
            ("encoder", family.encoder, self.network.encoder_blocks, self.network.encoder),
            ("decoder", family.decoder, self.network.decoder_blocks, self.network.decoder),
        ):
            stack = self.whole.get_submodule(path)
            stack.get_submodule("embed_tokens").register_forward_hook(self._keep(f"{name} embeddings"))
            blocks = cast("nn.ModuleList", stack.get_submodule(family.blocks))
            for index in tapped:
                blocks[index].register_forward_hook(self._keep(f"{name} {index}"))
            for index, block in enumerate(cast("nn.ModuleList", side.stack.get_submodule(family.blocks))):
                block._forward_hooks.clear()
                block._forward_pre_hooks.clear()
                block._forward_pre_hooks_with_kwargs.clear()
                block.forward = self._mixing(side, index, f"{name} {tapped[index]}", block.forward)
        decoder.register_forward_hook(self._in_its_place)

    def forward(self, **batch: Tensor) -> Seq2SeqLMOutput:
        self._mask = batch["attention_mask"]
        output: Seq2SeqLMOutput = self.whole(**batch, use_cache=False)
        return output

    def _keep(self, name: str) -> Callable[..., None]:
        def hook(_module: nn.Module, _args: object, output: Any) -> None:
            self._outputs[name] = output[0] if isinstance(output, tuple) else output

        return hook

    def _mixing(self, side: Any, index: int, read: str, block: Callable[..., Any]) -> Callable[..., Any]:
        def forward(state: Tensor, *args: Any, **kwargs: Any) -> Any:
            mu = torch.sigmoid(side.gates[index] / 0.1)
            return block(mu * state + (1 - mu) * side.taps[index](self._outputs[read]), *args, **kwargs)

        return forward

    def _in_its_place(self, _decoder: nn.Module, _args: object, output: Any) -> Any:
        network = self.network
        start = network.encoder.start(self._outputs["encoder embeddings"])
        source = network.encoder.stack(inputs_embeds=start, attention_mask=self._mask).last_hidden_state
        start = network.decoder.start(self._outputs["decoder embeddings"])
        state = network.decoder.stack(
            inputs_embeds=start, encoder_hidden_states=source, encoder_attention_mask=self._mask, use_cache=False
        ).last_hidden_state
        up = network.head.up(state)
        if network.head.gate is not None:
            up = output.last_hidden_state + torch.sigmoid(network.head.gate / 0.1) * up
        output.last_hidden_state = up
        return output
