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
from tidelock.model.channels import RESIDUAL, Axes, Group, Heads, axes_of

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping, Sequence

    from transformers import PretrainedConfig, PreTrainedModel

    # The score of every weight of a parameter, by the parameter's name in its stack.
    Scores = Callable[[str], Tensor]


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

    def outside(self) -> dict[str, nn.Parameter]:
        """Return the parameters that belong to no block, by name."""
        return {n: p for n, p in self.module.named_parameters() if not n.startswith(f"{self.blocks}.")}


def magnitude_scores(decoder: nn.Module) -> Scores:
    """Return the absolute value of each weight as its score: the fallback that needs no data."""
    return lambda name: decoder.get_parameter(name).detach().abs()


def fisher_scores(model: PreTrainedModel, decoder: str, examples: Iterable[Mapping[str, Tensor]]) -> Scores:
    """Return the sum of each weight's squared loss gradients over examples as its score.

    Takes three times the model's memory. The model is afterwards as frozen as it was before.

    Args:
        model: The whole causal model, in eval mode, fp32.
        decoder: The decoder's name in it.
        examples: What the model is called with, labels among it; one example each.

    Raises:
        ConfigError: There are no examples.
    """
    parameters = dict(model.get_submodule(decoder).named_parameters())
    sums = {name: torch.zeros_like(parameter) for name, parameter in parameters.items()}
    were_trained = [parameter.requires_grad for parameter in parameters.values()]
    empty = True
    try:
        for parameter in parameters.values():
            parameter.requires_grad = True
        for example in examples:
            empty = False
            loss = model(**example, use_cache=False).loss
            gradients = torch.autograd.grad(loss, list(parameters.values()))
            for total, gradient in zip(sums.values(), gradients, strict=True):
                total.addcmul_(gradient, gradient)
    finally:
        for parameter, was_trained in zip(parameters.values(), were_trained, strict=True):
            parameter.requires_grad = was_trained
    if empty:
        msg = "Fisher scores: expected a sample of at least one example, got none. Use init 'magnitude' without data."
        raise ConfigError(msg)
    return sums.__getitem__


@torch.no_grad()
def copy_pruned(stack: Stack, small: Stack, blocks: Sequence[int], scores: Scores) -> Tensor:
    """Copy the highest-scoring channels of a stack's blocks, and of what is around them, into a reduced stack.

    Args:
        stack: The frozen one.
        small: Its reduced copy.
        blocks: The block of `stack` that each block of `small` is copied from.
        scores: Of every weight of `stack`.

    Returns:
        Which residual channels the copies are of, int64 of shape (S,), ascending.

    Raises:
        ModelError: The family's blocks are not understood.
    """
    heads, width = Heads.of(stack.config), stack.config.hidden_size
    axes = [axes_of(stack.block(block), heads) for block in blocks]
    sums = [
        _sums(by_name, {name: scores(f"{stack.blocks}.{block}.{name}") for name in by_name})
        for block, by_name in zip(blocks, axes, strict=True)
    ]
    outside = {name: ((RESIDUAL,),) for name, p in stack.outside().items() if p.shape[-1] == width}
    sums_outside = _sums(outside, {name: scores(name).reshape(-1, width).sum(0) for name in outside})
    residual = _highest(
        torch.stack([each.pop(RESIDUAL) for each in (*sums, sums_outside)]).sum(0), small.config.hidden_size
    )
    for index, block in enumerate(blocks):
        target = small.block(index)
        sizes = _sizes(axes_of(target, Heads.of(small.config)), target)
        kept = {g: _choose(g, score, sizes[g], (heads, Heads.of(small.config))) for g, score in sums[index].items()}
        for name, parameter in target.named_parameters():
            source = stack.block(block).get_parameter(name)
            _copy(source, parameter, axes[index][name], {RESIDUAL: residual, **kept})
    for name, parameter in small.outside().items():
        source = stack.module.get_parameter(name)
        # Tables of positions are kept for every position.
        whole = torch.arange(source.shape[0])
        _copy(source, parameter, ((_ALL,),) * (source.ndim - 1) + ((RESIDUAL,),), {RESIDUAL: residual, _ALL: whole})
    return residual


_ALL = Group("residual", "all")


def _sums(axes: Mapping[str, Axes], scores: Mapping[str, Tensor]) -> dict[Group, Tensor]:
    """Return the score of each channel of each group: the sum over the weights that are of it."""
    sums: dict[Group, Tensor] = {}
    for name, groups_of_axes in axes.items():
        for axis, groups in enumerate(groups_of_axes):
            others = [other for other in range(scores[name].ndim) if other != axis]
            on_axis = scores[name].sum(others) if others else scores[name]
            for group, part in zip(groups, on_axis.chunk(len(groups)), strict=True):
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
        return _highest(scores, count)
    pairs, small_pairs = full.rotary // 2, small.rotary // 2
    of_pairs = scores[:pairs] + scores[pairs : full.rotary]
    bands = [range(i * pairs // small_pairs, (i + 1) * pairs // small_pairs) for i in range(small_pairs)]
    chosen = torch.tensor([max(band, key=lambda pair: float(of_pairs[pair])) for band in bands])
    rest = full.rotary + _highest(scores[full.rotary :], count - small.rotary)
    return torch.cat([chosen, pairs + chosen, rest])


def _highest(scores: Tensor, count: int) -> Tensor:
    """Return the indices of the highest scores, ascending."""
    return scores.topk(count).indices.sort().values


def _copy(source: Tensor, target: Tensor, axes: Axes, kept: Mapping[Group, Tensor]) -> None:
    """Copy the kept sub-matrix of a weight."""
    part = source.detach()
    for axis, groups in enumerate(axes):
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
