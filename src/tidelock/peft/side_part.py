"""A part of a side network: the side blocks beside the consecutive blocks that one device of a pool holds.

Its parameters have in the whole network the names that `NetworkPart.names` gives them; the gates, one vector there, are
the concatenation of the parts' vectors.

Shapes: N real tokens, M selected tokens, E embedding width, D hidden width, S side width, F width of the state that
the head reads. May import errors, `model`, `peft` and libraries.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, final

import torch
from torch import Tensor

from tidelock.errors import ConfigError
from tidelock.model.rows import Rows
from tidelock.peft.network_part import NetworkPart
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
class SidePart(NetworkPart):
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
        self.names = self.names_in_whole()
        self.slices = {GATES: slice(blocks.start, blocks.stop)}

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

    def whole_name(self, own: str) -> str:
        """Return the name in the whole network: taps and blocks are numbered there from its first block on."""
        whole = own.removeprefix("network.")
        for path in ("side.taps.", f"side.stack.{self.network.family.blocks}."):
            if whole.startswith(path):
                number, _, rest = whole.removeprefix(path).partition(".")
                return f"{path}{self.blocks.start + int(number)}.{rest}"
        return whole

    def outcome(self) -> Tensor:
        """Return what goes on to the next part, or to the head that the network is before."""
        network = self.network
        layout = Rows((0,), (2,), 2).layout(network.side.gates.device)
        outputs_ND = [torch.zeros(2, network.tap_width) for _ in self.blocks]
        state_NS = torch.zeros(2, network.side.start.out_features)
        if self.is_first:
            state_NS = self.begin(torch.zeros(2, network.side.start.in_features), layout)
        state_NS, final_NS = self.forward(state_NS, outputs_ND, layout)
        if not self.is_last:
            return state_NS
        final_NF: Tensor = network.head(final_NS, torch.zeros(2, network.head.up.out_features))
        return final_NF


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
