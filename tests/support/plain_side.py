"""The oracle of the side method: the whole model in one graph, with hooks, as someone would write it who has no cut.

Every frozen block is watched by a hook; the side decoder's layers are called through a wrapper that mixes; what comes
out is added to the input of the head, that for language or that for whole texts. Loss, shifting and pooling are
`transformers`' own.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast, final

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.modeling_outputs import CausalLMOutput, SequenceClassifierOutput

from tests.support.parity import TokenBatch, plain_model
from tidelock.backbone.local import LocalBackbone
from tidelock.device.side_model import SideModel
from tidelock.device.tap_source import TapSource
from tidelock.model.checkpoint import Checkpoint
from tidelock.model.ends import Ends, read_config
from tidelock.model.frames import Frames
from tidelock.model.load import ModelChoice, load_cut_model
from tidelock.peft.side import SideConfig


def side_model(folder: Path, config: SideConfig, num_labels: int | None = None) -> SideModel:
    """Return a side model over frozen blocks in this process."""
    checkpoint = Checkpoint.open(str(folder))
    backbone = LocalBackbone(load_cut_model(checkpoint, ModelChoice(str(folder))))
    return SideModel(Ends(read_config(folder), checkpoint), TapSource(lambda: backbone), config, num_labels=num_labels)


@torch.no_grad()
def randomise_side(model: nn.Module, seed: int = 1) -> None:
    """Make every trained parameter random, gates included, and large enough to matter."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        noise = torch.randn(parameter.shape, generator=generator)
        if "gate" in name:
            parameter.copy_(noise * 0.1)  # T is 0.1: gates of about 0.3 to 0.7
        else:
            parameter.add_(noise * (0.3 if parameter.ndim < 2 else 1.0 / parameter.shape[-1] ** 0.5))


@final
class PlainSide(nn.Module):
    """The whole model with a side network that has the same parameters, under the same names, as a side model's."""

    def __init__(self, folder: Path, like: SideModel) -> None:
        super().__init__()
        # Not a submodule: its parameters are none of the side network's.
        num_labels = None if like.head is None else like.head.out_features
        self.__dict__["whole"] = plain_model(folder, num_labels).requires_grad_(requires_grad=False)
        head = self.whole.get_output_embeddings()
        if like.head is not None:
            head = self.head = cast("nn.Linear", self.whole.get_submodule("score"))
            head.load_state_dict(like.head.state_dict())
            head.requires_grad_()
        self.network = copy.deepcopy(like.network)
        family, geometry = like.ends.geometry.family, like.ends.geometry
        self._mask: Tensor | None = None
        self._outputs: dict[str, Tensor] = {}
        self._frames = Frames(geometry, torch.device("cpu"), torch.float32)
        decoder = self.whole.get_submodule(family.decoder)
        self.whole.get_input_embeddings().register_forward_hook(self._keep("embeddings"))
        blocks = cast("nn.ModuleList", decoder.get_submodule(family.blocks))
        for index in self.network.blocks:
            blocks[index].register_forward_hook(self._keep(f"block {index}"))
        head.register_forward_pre_hook(self._add_side)
        side_blocks = cast("nn.ModuleList", self.network.side.stack.get_submodule(family.blocks))
        assert len(side_blocks) == len(self.network.blocks) <= geometry.num_blocks
        for index, block in enumerate(side_blocks):
            block._forward_hooks.clear()
            block._forward_pre_hooks.clear()
            block._forward_pre_hooks_with_kwargs.clear()
            block.forward = self._mixing(index, block.forward)

    whole: PreTrainedModel

    def forward(self, batch: TokenBatch) -> CausalLMOutput | SequenceClassifierOutput:
        self._mask = batch.attention_mask
        output: CausalLMOutput | SequenceClassifierOutput = self.whole(**batch.arguments(), use_cache=False)
        return output

    def _keep(self, name: str) -> Callable[..., None]:
        def hook(_module: nn.Module, _args: object, output: Any) -> None:
            self._outputs[name] = output[0] if isinstance(output, tuple) else output

        return hook

    def _mixing(self, index: int, block: Callable[..., Any]) -> Callable[..., Any]:
        def forward(*args: Any, **kwargs: Any) -> Any:
            state = kwargs.pop("hidden_states") if "hidden_states" in kwargs else args[0]
            mu = torch.sigmoid(self.network.side.gates[index] / 0.1)
            number = self.network.blocks[index]
            tap = self._outputs[f"block {number}"]
            if self.network.config.tap_width is not None:
                shape = (*tap.shape[:-1], self.network.config.tap_width)
                tap = self._frames.narrow(number, tap.flatten(0, -2), self.network.config.tap_width).reshape(shape)
            read = self.network.side.taps[index](tap)
            return block(mu * state + (1 - mu) * read, *args[1:], **kwargs)

        return forward

    def _add_side(self, _head: nn.Module, args: tuple[Tensor]) -> tuple[Tensor]:
        start = self.network.side.start(self._outputs["embeddings"])
        output = self.network.side.stack(inputs_embeds=start, attention_mask=self._mask, use_cache=False)
        up = self.network.head.up(output.last_hidden_state)
        if self.network.head.gate is None:
            return (up,)
        return (args[0] + torch.sigmoid(self.network.head.gate / 0.1) * up,)
