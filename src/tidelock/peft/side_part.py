"""A part of a side network: the side blocks beside the consecutive blocks that one device of a pool holds.

Its parameters have in the whole network the names that `SidePart.names` gives them; the gates, one vector there, are
the concatenation of the parts' vectors.

Shapes: N real tokens, M selected tokens, E embedding width, D hidden width, S side width, F width of the state that
the head reads. May import errors, `model`, `peft` and libraries.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, final

import torch
from torch import Tensor, nn

from tidelock.errors import ConfigError
from tidelock.model.rows import Rows
from tidelock.peft.prune import Stack, magnitude_scores, residual_scores
from tidelock.peft.side import SideNetwork

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from transformers import PretrainedConfig

    from tidelock.model.geometry import Geometry
    from tidelock.model.part import ModelPart
    from tidelock.model.rows import Layout
    from tidelock.peft.side import SideConfig

# The one parameter of which every part has a piece.
GATES = "side.gates"


@final
class SidePart(nn.Module):
    """The side blocks beside blocks `first` to `end - 1`, and what is before the first and after the last one.

    Args:
        config: What the whole network is like; every block is tapped, whole.
        model_config: The backbone's configuration.
        geometry: The whole backbone's.
        blocks: Numbers of the blocks, consecutive.

    Attributes:
        network: A side network of these blocks alone.
        blocks: As given.
        is_first: Whether the whole network begins here.
        is_last: Whether it ends here.
        names: Of each own parameter that the outcome depends on, its name in the whole network.
        slices: Where in a parameter of the whole network this part's is, if it is not all of it.

    Raises:
        ConfigError: The configuration chooses or narrows taps.
        ModelError: The family's class does not take the reduced widths.
    """

    def __init__(self, config: SideConfig, model_config: PretrainedConfig, geometry: Geometry, blocks: range) -> None:
        super().__init__()
        require_whole_taps(config)
        self.network = SideNetwork(replace(config, taps=tuple(blocks)), model_config, geometry)
        self.blocks = blocks
        self.is_first = blocks.start == 0
        self.is_last = blocks.stop == geometry.num_blocks
        self.names = self._names_in_whole()
        self.slices = {GATES: slice(blocks.start, blocks.stop)}

    def trained(self) -> dict[str, nn.Parameter]:
        """Return the parameters that are this part's to train, under their names in the whole network."""
        parameters = dict(self.network.named_parameters())
        return {whole: parameters[own] for own, whole in self.names.items()}

    @torch.no_grad()
    def load_whole(self, state: Mapping[str, Tensor]) -> None:
        """Take this part's parameters out of those of the whole network."""
        own = self.own_of(state)
        for name, parameter in self.trained().items():
            parameter.copy_(own[name])

    def own_of(self, whole: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return what is this part's of tensors that are shaped as the whole network's parameters, by their names."""
        return {name: whole[name][self.slices.get(name, ...)] for name in self.names.values()}

    def residual_scores(self, frozen: ModelPart, embedding_VE: Tensor | None) -> Tensor:
        """Return this part's share of the residual channels' scores by magnitude, shape (D,); see `start_from`.

        Args:
            frozen: The blocks beside which this part stands.
            embedding_VE: The word embedding's weight; read by the first part.
        """
        scores = residual_scores(
            self._stack(frozen), range(len(self.blocks)), magnitude_scores(), with_outside=self.is_first
        )
        if self.is_first and embedding_VE is not None and embedding_VE.shape[-1] == len(scores):
            scores += embedding_VE.abs().sum(0)
        return scores

    def start_from(self, frozen: ModelPart, residual: Tensor) -> None:
        """Begin by the weights' magnitude, as the whole network does.

        Args:
            frozen: The blocks beside which this part stands.
            residual: Scores of the residual channels: the sum of all parts' shares.

        Raises:
            ModelError: The family's blocks are not understood.
        """
        blocks = range(len(self.blocks))
        self.network.side.start_from(self._stack(frozen), blocks, magnitude_scores(), residual=residual)

    def _stack(self, frozen: ModelPart) -> Stack:
        return Stack(frozen.decoder, self.network.family.blocks, frozen.config)

    def begin(self, embeddings_NE: Tensor, layout: Layout) -> Tensor:
        """Return the first side state, shape (N, S), of the part with the first block."""
        return layout.pack(self.network.side.begin(embeddings_NE, layout))

    def forward(self, state_NS: Tensor, outputs_ND: Sequence[Tensor], layout: Layout) -> tuple[Tensor, Tensor]:
        """Return the side state for the next part, and after the family's last norm, each (N, S).

        Args:
            state_NS: What `begin` gave, or the part before.
            outputs_ND: What the part's frozen blocks gave.
            layout: How these tokens lie in the padded batch.
        """
        state_BTS, final_BTS = self.network.side.forward_part(
            layout.unpack(state_NS), outputs_ND, layout, is_first=self.is_first
        )
        return layout.pack(state_BTS), layout.pack(final_BTS)

    def _names_in_whole(self) -> dict[str, str]:
        """Return for each parameter that has a part in the outcome its name in the whole network."""
        network, first = self.network, self.blocks.start
        paths = ("side.taps.", f"side.stack.{network.family.blocks}.")
        used = self._used()
        names = {}
        for own, parameter in network.named_parameters():
            if id(parameter) not in used:
                continue
            whole = own
            for path in paths:
                if own.startswith(path):
                    number, _, rest = own.removeprefix(path).partition(".")
                    whole = f"{path}{first + int(number)}.{rest}"
            names[own] = whole
        return names

    def _used(self) -> set[int]:
        """Return the ids of the parameters that this part's outcome depends on, seen from one pass of two tokens."""
        network = self.network
        layout = Rows((0,), (2,), 2).layout(network.side.gates.device)
        outputs_ND = [torch.zeros(2, network.tap_width) for _ in self.blocks]
        width = network.side.start.out_features
        with torch.enable_grad():
            state_NS = (
                self.begin(torch.zeros(2, network.side.start.in_features), layout)
                if self.is_first
                else torch.zeros(2, width)
            )
            state_NS, final_NS = self(state_NS, outputs_ND, layout)
            result = state_NS
            if self.is_last:
                result = network.head(final_NS, torch.zeros(2, network.head.up.out_features))
            parameters = list(network.parameters())
            found = torch.autograd.grad(result.sum(), parameters, allow_unused=True)
        return {id(p) for p, gradient in zip(parameters, found, strict=True) if gradient is not None}


def require_whole_taps(config: SideConfig) -> None:
    """Refuse what a part of a network does not do.

    Raises:
        ConfigError: The configuration chooses or narrows taps.
    """
    if config.taps is not None or config.tap_width is not None:
        msg = (
            f"Side network in a pool: expected every block to be read, whole, got taps={config.taps} and "
            f"tap_width={config.tap_width}. Leave these out."
        )
        raise ConfigError(msg)


def join_parts(parts: Sequence[Mapping[str, Tensor]]) -> dict[str, Tensor]:
    """Return the whole network's parameters by name.

    Args:
        parts: Of each part, in the order of its blocks, what `SidePart.trained` gives.
    """
    joined = {name: value for part in parts for name, value in part.items()}
    return joined | {GATES: torch.cat([part[GATES] for part in parts])}
