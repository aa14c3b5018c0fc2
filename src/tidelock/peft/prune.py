"""Starts side blocks from the backbone's own weights: structural pruning to 1/k of the channels.

Every weight has a score: how large it is, or how much the loss of some examples depends on it (empirical Fisher
information). A channel's score is the sum over the weights that read or write it; the highest are kept and the
sub-matrices copied. This follows LST's `fisher-v2` and its magnitude variant (arXiv 2206.06522, section 3.3, and the
released code), which PAC uses, with these differences, all of which keep the copy one consistent, thinner network:

- The residual stream keeps one set of channels throughout; there, every layer chooses its own.
- Each head keeps as many of its own channels as every other one; there, channels are chosen regardless of heads.
- Queries and keys share a choice, as they are multiplied with each other, and values share one with the output
  projection; there, q, k and v share one, by the product of their scores.
- Rotary channels are kept in pairs, one out of each band of neighbouring frequencies, because the side block turns its
  few pairs at evenly spaced frequencies. T5, for which LST's code is written, has no rotary embedding.

May import errors, `model` and libraries.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, cast, final

import torch
from torch import Tensor, nn

from tidelock.errors import ConfigError, ModelError
from tidelock.model.channels import ENCODER_RESIDUAL, RESIDUAL, WHOLE, Axes, Group, Heads, axes_of

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping, Sequence

    from transformers import PretrainedConfig, PreTrainedModel

    # The score of every weight of a parameter.
    Scores = Callable[[nn.Parameter], Tensor]


@final
@dataclass(frozen=True, slots=True)
class Stack:
    """A stack of blocks, and what tells its channels apart.

    Attributes:
        module: The decoder.
        blocks: The name of its list of blocks.
        config: Its configuration.
    """

    module: nn.Module
    blocks: str
    config: PretrainedConfig

    def block(self, index: int) -> nn.Module:
        """Return a block."""
        return cast("nn.ModuleList", self.module.get_submodule(self.blocks))[index]

    def parameter(self, index: int, name: str) -> nn.Parameter:
        """Return a parameter of a block, or of the first one where only that has it (T5's relative positions)."""
        block = self.block(index)
        owner = block if name in dict(block.named_parameters()) else self.block(0)
        return owner.get_parameter(name)

    def outside(self) -> dict[str, nn.Parameter]:
        """Return the parameters that belong to no block, by name."""
        return {n: p for n, p in self.module.named_parameters() if not n.startswith(f"{self.blocks}.")}


def magnitude_scores() -> Scores:
    """Return the absolute value of each weight as its score: the fallback that needs no data."""
    return lambda parameter: parameter.detach().abs()


def fisher_scores(
    model: PreTrainedModel, stacks: Sequence[nn.Module], examples: Iterable[Mapping[str, Tensor]]
) -> Scores:
    """Return the sum of each weight's squared loss gradients over examples as its score.

    Takes three times the stacks' memory. The model is afterwards as frozen as it was before.

    Args:
        model: The whole model, in eval mode, fp32.
        stacks: The parts of it whose weights are scored.
        examples: What the model is called with, labels among it; one example each.

    Raises:
        ConfigError: There are no examples.
    """
    # A tied weight is in several stacks, and is one.
    parameters = list({id(p): p for stack in stacks for p in stack.parameters()}.values())
    sums = {id(parameter): torch.zeros_like(parameter) for parameter in parameters}
    were_trained = [parameter.requires_grad for parameter in parameters]
    empty = True
    try:
        for parameter in parameters:
            parameter.requires_grad = True
        for example in examples:
            empty = False
            gradients = torch.autograd.grad(model(**example, use_cache=False).loss, parameters)
            for parameter, gradient in zip(parameters, gradients, strict=True):
                sums[id(parameter)].addcmul_(gradient, gradient)
    finally:
        for parameter, was_trained in zip(parameters, were_trained, strict=True):
            parameter.requires_grad = was_trained
    if empty:
        msg = "Fisher scores: expected a sample of at least one example, got none. Use init 'magnitude' without data."
        raise ConfigError(msg)
    return lambda parameter: sums[id(parameter)]


@torch.no_grad()
def residual_scores(stack: Stack, blocks: Sequence[int], scores: Scores, *, with_outside: bool = True) -> Tensor:
    """Return the score of each residual channel, shape (D,): the sum over the weights that read or write it.

    Args:
        stack: The frozen one.
        blocks: Which of its blocks count.
        scores: Of every weight of `stack`.
        with_outside: Count what is around the blocks too. In a pool, where each device has some of the blocks and all
            of that, only one device counts it, and the sum over the devices is that of the whole stack.
    """
    heads, width = Heads.of(stack.config), stack.config.hidden_size
    sums = [_block_sums(stack, block, heads, scores) for block in blocks]
    if with_outside:
        outside = {name: parameter for name, parameter in stack.outside().items() if parameter.shape[-1] == width}
        sums.append(_sums({name: _outside_axes(parameter) for name, parameter in outside.items()}, outside, scores))
    return torch.stack([each[RESIDUAL] for each in sums]).sum(0)


@torch.no_grad()
def copy_pruned(
    stack: Stack,
    small: Stack,
    blocks: Sequence[int],
    scores: Scores,
    encoder_residual: Tensor | None = None,
    residual: Tensor | None = None,
) -> Tensor:
    """Copy the highest-scoring channels of a stack's blocks, and of what is around them, into a reduced stack.

    Args:
        stack: The frozen one.
        small: Its reduced copy.
        blocks: The block of `stack` that each block of `small` is copied from.
        scores: Of every weight of `stack`.
        encoder_residual: For a decoder that reads an encoder: which channels were kept of that.
        residual: The scores of the residual channels, where `stack` is a part of the one that decides; see
            `residual_scores`.

    Returns:
        Which residual channels the copies are of, int64 of shape (S,), ascending.

    Raises:
        ModelError: The family's blocks are not understood.
    """
    heads = Heads.of(stack.config)
    if residual is None:
        residual = residual_scores(stack, blocks, scores)
    kept = {RESIDUAL: highest(residual, small.config.hidden_size)}
    if encoder_residual is not None:
        kept[ENCODER_RESIDUAL] = encoder_residual
    small_heads = Heads.of(small.config)
    for index, block in enumerate(blocks):
        target = small.block(index)
        axes = axes_of(target, small_heads)
        sizes = _sizes(axes, target)
        sums = _block_sums(stack, block, heads, scores)
        chosen = {g: _choose(g, score, sizes[g], (heads, small_heads)) for g, score in sums.items()}
        for name, parameter in target.named_parameters():
            _copy(stack.parameter(block, name), parameter, axes[name], {**chosen, **kept})
    for name, parameter in small.outside().items():
        _copy(stack.module.get_parameter(name), parameter, _outside_axes(parameter), kept)
    return kept[RESIDUAL]


def _outside_axes(parameter: Tensor) -> Axes:
    """Return the axes of norms and of tables of positions or words: the last counts the residual stream."""
    return ((WHOLE,),) * (parameter.ndim - 1) + ((RESIDUAL,),)


def _block_sums(stack: Stack, block: int, heads: Heads, scores: Scores) -> dict[Group, Tensor]:
    """Return the score of each channel of each group of a block."""
    module = stack.block(block)
    return _sums(axes_of(module, heads), dict(module.named_parameters()), scores)


def _sums(axes: Mapping[str, Axes], parameters: Mapping[str, nn.Parameter], scores: Scores) -> dict[Group, Tensor]:
    """Return the score of each channel of each group: the sum over the weights that are of it."""
    sums: dict[Group, Tensor] = {}
    for name, groups_of_axes in axes.items():
        score = scores(parameters[name])
        for axis, groups in enumerate(groups_of_axes):
            others = [other for other in range(score.ndim) if other != axis]
            on_axis = score.sum(others) if others else score
            for group, part in zip(groups, on_axis.chunk(len(groups)), strict=True):
                if group.kind != "whole":
                    sums[group] = sums[group] + part if group in sums else part
    return sums


def _sizes(axes: Mapping[str, Axes], block: nn.Module) -> dict[Group, int]:
    """Return how many channels each group of a block has."""
    return {
        group: block.get_parameter(name).shape[axis] // len(groups)
        for name, groups_of_axes in axes.items()
        for axis, groups in enumerate(groups_of_axes)
        for group in groups
    }


def _choose(group: Group, scores: Tensor, count: int, heads: tuple[Heads, Heads]) -> Tensor:
    """Return which channels of a group are kept, in the order in which the small block has them."""
    full, small = heads
    if group.kind != "query-key" or not full.rotary:
        return highest(scores, count)
    pairs, small_pairs = full.rotary // 2, small.rotary // 2
    of_pairs = scores[:pairs] + scores[pairs : full.rotary]
    bands = [range(i * pairs // small_pairs, (i + 1) * pairs // small_pairs) for i in range(small_pairs)]
    chosen = torch.tensor([max(band, key=lambda pair: float(of_pairs[pair])) for band in bands])
    rest = full.rotary + highest(scores[full.rotary :], count - small.rotary)
    return torch.cat([chosen, pairs + chosen, rest])


def highest(scores: Tensor, count: int) -> Tensor:
    """Return the indices of the highest scores, ascending."""
    return scores.topk(count).indices.sort().values


def _copy(source: Tensor, target: Tensor, axes: Axes, kept: Mapping[Group, Tensor]) -> None:
    """Copy the kept sub-matrix of a weight."""
    part = source.detach()
    for axis, groups in enumerate(axes):
        if groups == (WHOLE,):
            continue
        size = source.shape[axis] // len(groups)
        chosen = torch.cat([number * size + kept[group] for number, group in enumerate(groups)])
        part = part.index_select(axis, chosen.to(part.device))
    if part.shape != target.shape:
        msg = (
            f"Pruning a weight: expected a part of shape {tuple(target.shape)}, got {tuple(part.shape)} out of "
            f"{tuple(source.shape)}. Start this model's side network with init 'random'."
        )
        raise ModelError(msg)
    target.copy_(part)
