"""What side networks of every kind are made of: a stack of side blocks that reads taps, and a head.

The formulas are in `peft.side`.

Shapes: N real tokens, M selected tokens, B rows, T positions, E embedding width, D hidden width, S side width,
F width of the state that the frozen head reads. May import errors, `model`, `peft` and libraries.
"""

from __future__ import annotations

from contextvars import ContextVar
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, cast, final

import torch
from torch import Tensor, nn

from tidelock.model.call import call_decoder
from tidelock.peft.prune import Stack, copy_pruned, fisher_scores, magnitude_scores

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping, Sequence

    from transformers import Cache, PreTrainedModel

    from tidelock.model.rows import Layout
    from tidelock.peft.prune import Scores
    from tidelock.peft.side import SideConfig, SideInit


@final
@dataclass(slots=True)
class _Run:
    """What the hooks on the side blocks do with a block's input, and the last block's output that they saw."""

    mix: Callable[[int, Tensor], Tensor]
    last_BTS: Tensor | None = None


# Of the thread that runs the stack.
_RUN: ContextVar[_Run] = ContextVar("tidelock_side_run")


@final
class SideStack(nn.Module):
    """One stack of side blocks with its taps: all that is trained beside one stack of frozen blocks.

    Args:
        stack: The family's own decoder or encoder at the side width, without a word embedding; one block for each tap.
        widths: E, that of a tap, and S.
        temperature: T of the gates.

    Attributes:
        start: From embeddings to the first side state.
        taps: From each tapped block's output to the side width.
        gates: alpha, one a tap.
        stack: As given.
    """

    def __init__(self, stack: Stack, widths: tuple[int, int, int], temperature: float) -> None:
        super().__init__()
        embedding, tap, side = widths
        blocks = cast("nn.ModuleList", stack.module.get_submodule(stack.blocks))
        self.start = nn.Linear(embedding, side)
        self.taps = nn.ModuleList(nn.Linear(tap, side) for _ in blocks)
        self.gates = nn.Parameter(torch.zeros(len(blocks)))
        self.stack = stack.module
        self._facts = (stack.blocks, stack.config)
        self._temperature = temperature
        for index, block in enumerate(blocks):
            block.register_forward_pre_hook(_mix_before(index), with_kwargs=True)
        blocks[-1].register_forward_hook(_note_last)

    @torch.no_grad()
    def start_from(
        self,
        backbone: Stack,
        blocks: Sequence[int],
        scores: Scores,
        encoder_residual: Tensor | None = None,
        residual: Tensor | None = None,
    ) -> Tensor:
        """Copy the backbone's highest-scoring channels into the side blocks, and begin by reading just these.

        Args:
            backbone: The stack that this one stands beside, with its weights.
            blocks: The tapped blocks.
            scores: Of each weight.
            encoder_residual: For a decoder that reads an encoder: the channels kept of that.
            residual: Scores of the residual channels, where this stack is a part of a longer one.

        Returns:
            The kept channels of the residual stream, int64 of shape (S,).

        Raises:
            ModelError: The family's blocks are not understood.
        """
        residual_S = copy_pruned(backbone, Stack(self.stack, *self._facts), blocks, scores, encoder_residual, residual)
        self._read_channels(residual_S)
        return residual_S

    def forward(
        self,
        embeddings_NE: Tensor,
        taps_ND: Sequence[Tensor],
        layout: Layout,
        cache: Cache | None = None,
        more: Mapping[str, Tensor] | None = None,
    ) -> Tensor:
        """Return the stack's final side state, shape (B, T, S), after the family's own last norm.

        Args:
            embeddings_NE: Word embeddings of the real tokens.
            taps_ND: The tapped blocks' outputs at the same tokens.
            layout: How these tokens lie in the padded batch.
            cache: The side blocks' own keys and values of earlier tokens, extended in place.
            more: What else the stack takes.
        """
        _, final_BTS = self._run(self.begin(embeddings_NE, layout), taps_ND, layout, cache, more)
        return final_BTS

    def begin(self, embeddings_NE: Tensor, layout: Layout) -> Tensor:
        """Return the first side state, shape (B, T, S), as the stack is called with it."""
        return layout.unpack(self.start(embeddings_NE.to(self.gates)))

    def forward_part(
        self,
        state_BTS: Tensor,
        taps_ND: Sequence[Tensor],
        layout: Layout,
        *,
        is_first: bool,
        more: Mapping[str, Tensor] | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Return the last block's output and the final state, each (B, T, S), of a stack that is part of a longer one.

        Args:
            state_BTS: What `begin` gave where the part is the first, else the output of the side block before.
            taps_ND: The tapped blocks' outputs at the real tokens.
            layout: How these tokens lie in the padded batch.
            is_first: Whether the part is the first: only then is what a stack does before its first block done.
            more: What else the stack takes.
        """
        return self._run(state_BTS, taps_ND, layout, more=more, given_BTS=None if is_first else state_BTS)

    def _run(
        self,
        state_BTS: Tensor,
        taps_ND: Sequence[Tensor],
        layout: Layout,
        cache: Cache | None = None,
        more: Mapping[str, Tensor] | None = None,
        given_BTS: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Return the last block's output and the final state; `given_BTS` is what the first block gets instead."""
        mu = torch.sigmoid(self.gates / self._temperature)

        def mix(index: int, state_BTS: Tensor) -> Tensor:
            if index == 0 and given_BTS is not None:
                state_BTS = given_BTS
            read_NS = self.taps[index](taps_ND[index].to(self.gates))
            return torch.lerp(layout.unpack(read_NS), state_BTS, mu[index])

        run = _Run(mix)
        token = _RUN.set(run)
        try:
            final_BTS = call_decoder(self.stack, state_BTS, layout, cache=cache, more=more)
        finally:
            _RUN.reset(token)
        return cast("Tensor", run.last_BTS), final_BTS

    def _read_channels(self, residual_S: Tensor) -> None:
        """Begin with linears that pick these channels of what they read, where that is of the residual's width."""
        for linear in (self.start, *self.taps):
            if linear.in_features == self.taps[0].in_features:
                linear.weight.copy_(nn.functional.one_hot(residual_S, linear.in_features))
                nn.init.zeros_(linear.bias)


@final
class SideHead(nn.Module):
    """From the side network's state to the state that the frozen head reads.

    Args:
        side: S.
        final_width: F.
        config: Says whether it starts at zero, and whether the backbone's own final state is added.

    Attributes:
        up: From the side width to F.
        gate: beta, or None when the output stands alone.
    """

    def __init__(self, side: int, final_width: int, config: SideConfig) -> None:
        super().__init__()
        self.up = nn.Linear(side, final_width)
        self.gate = nn.Parameter(torch.zeros(())) if config.output == "add" else None
        self._temperature = config.temperature
        if config.zero_upsample:
            nn.init.zeros_(self.up.weight)
            nn.init.zeros_(self.up.bias)

    def forward(self, state_MS: Tensor, final_MF: Tensor) -> Tensor:
        """Return the state for the frozen head, shape (M, F), given the backbone's own."""
        up_MF: Tensor = self.up(state_MS)
        if self.gate is None:
            return up_MF
        return final_MF.to(up_MF) + torch.sigmoid(self.gate / self._temperature) * up_MF


def start_scores(
    init: SideInit,
    model: PreTrainedModel,
    stacks: Sequence[nn.Module],
    examples: Iterable[Mapping[str, Tensor]] | None,
) -> Scores | None:
    """Return the scores of a model's weights that a start asks for; None for a random one.

    Args:
        init: The start.
        model: The whole model, with its weights, in eval mode; for Fisher scores in fp32.
        stacks: The stacks of it that side blocks are copied from.
        examples: For Fisher scores: what the model is called with, labels among it; one example each.

    Raises:
        ConfigError: Fisher scores without examples.
    """
    if init == "random":
        return None
    return magnitude_scores() if init == "magnitude" else fisher_scores(model, stacks, examples or ())


def _mix_before(
    index: int,
) -> Callable[[nn.Module, tuple[Any, ...], dict[str, Any]], tuple[tuple[Any, ...], dict[str, Any]]]:
    def hook(
        _block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        mix = _RUN.get().mix
        if "hidden_states" in kwargs:
            return args, {**kwargs, "hidden_states": mix(index, kwargs["hidden_states"])}
        return (mix(index, args[0]), *args[1:]), kwargs

    return hook


def _note_last(_block: nn.Module, _args: tuple[Any, ...], output: Tensor | tuple[Tensor, ...]) -> None:
    _RUN.get().last_BTS = output[0] if isinstance(output, tuple) else output
