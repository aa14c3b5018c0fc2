"""The side network: a small trained network beside the frozen blocks, which reads their outputs (PAC, LST).

It is the family's own decoder at 1/k of the width. Before its block i, which stands beside backbone block b:

    s <- mu_i s + (1 - mu_i) (W_i x_b + c_i),    mu_i = sigmoid(alpha_i / T)

with x_b the backbone block's output, alpha_i a trained scalar that starts at 0 and T = 0.1. It starts from
s = W_0 x_0 + c_0, x_0 the word embeddings (PAC, doi 10.1145/3673038.3673043, section 4.1; the gate is that of its
released code and of LST, arXiv 2206.06522, section 3.3). What PAC leaves open for decoders is settled thus: after the
family's own last norm,

    h = f + sigmoid(beta / T) (W s + c)

goes to the frozen head, with f the backbone's final state and beta a trained scalar that starts at 0. With W and c
zero at the start (`zero_upsample`), the first step is the backbone's, as in LoRA. `output="alone"` leaves f out.

Shapes: N real tokens, M selected tokens, B rows, T positions, E embedding width, D hidden width, S side width,
F width of the state that the head reads. May import errors, `model` and libraries.
"""

from __future__ import annotations

from contextvars import ContextVar
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, cast, final, get_args

import torch
from torch import Tensor, nn
from transformers import DynamicCache

from tidelock.errors import ConfigError
from tidelock.model.call import call_decoder
from tidelock.model.reduced import reduced_config, reduced_decoder
from tidelock.peft.prune import Stack, copy_pruned, fisher_scores, magnitude_scores

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping, Sequence

    from transformers import Cache, PretrainedConfig, PreTrainedModel

    from tidelock.model.geometry import Geometry
    from tidelock.model.rows import Layout
    from tidelock.model.taps import Taps
    from tidelock.peft.prune import Scores

SideInit = Literal["fisher", "magnitude", "random"]
SideOutput = Literal["add", "alone"]


@final
@dataclass(frozen=True, slots=True)
class SideConfig:
    """What a side network is like and how it starts.

    Attributes:
        reduction: k: every width of the backbone is divided by it.
        taps: The blocks whose outputs are read, by number; None reads every block.
        init: Where the side blocks' weights come from: the backbone's channels of the highest Fisher score
            (`fisher`, needs a sample of data), of the largest weights (`magnitude`), or chance (`random`).
        zero_upsample: Start with an upsampling of zero, so that the first step's loss is the backbone's.
        output: `add` the side network's output to the backbone's final state, or let it stand `alone`.
        temperature: T of the gates.
        seed: Fixes the random part of the start.

    Raises:
        ConfigError: A value is out of range.
    """

    reduction: int = 8
    taps: tuple[int, ...] | None = None
    init: SideInit = "magnitude"
    zero_upsample: bool = True
    output: SideOutput = "add"
    temperature: float = 0.1
    seed: int = 0

    def __post_init__(self) -> None:
        taps = self.taps
        rules: tuple[tuple[str, bool, str], ...] = (
            ("reduction", self.reduction >= 1, "at least 1"),
            ("taps", taps is None or (len(taps) > 0 and list(taps) == sorted(set(taps)) and taps[0] >= 0),
             "None, or block numbers in ascending order, each once"),
            ("init", self.init in get_args(SideInit), f"one of {get_args(SideInit)}"),
            ("output", self.output in get_args(SideOutput), f"one of {get_args(SideOutput)}"),
            ("temperature", self.temperature > 0, "more than 0"),
            ("zero_upsample", not (self.zero_upsample and self.output == "alone"),
             "False with output 'alone', which would be zero"),
        )  # fmt: skip
        for name, kept, rule in rules:
            if not kept:
                msg = f"SideConfig.{name}: expected {rule}, got {getattr(self, name)!r}. Change it."
                raise ConfigError(msg)

    def blocks(self, num_blocks: int) -> tuple[int, ...]:
        """Return the tapped blocks of a backbone.

        Raises:
            ConfigError: It has fewer blocks than the configuration names.
        """
        taps = tuple(range(num_blocks)) if self.taps is None else self.taps
        if taps[-1] >= num_blocks:
            msg = (
                f"SideConfig.taps: expected blocks 0 to {num_blocks - 1}, as the model has, got {taps[-1]}. Leave out "
                "what it does not have."
            )
            raise ConfigError(msg)
        return taps


# What the hooks on the side blocks do with a block's input, in the thread that runs the stack.
_MIX: ContextVar[Callable[[int, Tensor], Tensor]] = ContextVar("tidelock_mix")


@final
class SideStack(nn.Module):
    """One stack of side blocks with its taps: all that is trained beside one stack of frozen blocks.

    Args:
        stack: The family's own decoder or encoder at the side width, without a word embedding.
        blocks: Its blocks, one for each tap.
        widths: E, D and S.
        temperature: T of the gates.

    Attributes:
        start: From embeddings to the first side state.
        taps: From each tapped block's output to the side width.
        gates: alpha, one a tap.
        stack: As given.
    """

    def __init__(
        self, stack: nn.Module, blocks: Sequence[nn.Module], widths: tuple[int, int, int], temperature: float
    ) -> None:
        super().__init__()
        embedding, hidden, side = widths
        self.start = nn.Linear(embedding, side)
        self.taps = nn.ModuleList(nn.Linear(hidden, side) for _ in blocks)
        self.gates = nn.Parameter(torch.zeros(len(blocks)))
        self.stack = stack
        self._temperature = temperature
        for index, block in enumerate(blocks):
            block.register_forward_pre_hook(_mix_before(index), with_kwargs=True)

    @torch.no_grad()
    def read_channels(self, residual_S: Tensor) -> None:
        """Begin with linears that pick these channels of what they read, where that is of the residual's width."""
        for linear in (self.start, *self.taps):
            if linear.in_features == self.taps[0].in_features:
                linear.weight.copy_(nn.functional.one_hot(residual_S, linear.in_features))
                nn.init.zeros_(linear.bias)

    def forward(
        self,
        embeddings_NE: Tensor,
        taps_ND: Sequence[Tensor],
        layout: Layout,
        cache: Cache | None = None,
        **more: Tensor,
    ) -> Tensor:
        """Return the stack's final side state, shape (B, T, S), after the family's own last norm.

        Args:
            embeddings_NE: Word embeddings of the real tokens.
            taps_ND: The tapped blocks' outputs at the same tokens.
            layout: How these tokens lie in the padded batch.
            cache: The side blocks' own keys and values of earlier tokens, extended in place.
            **more: What else the stack takes.
        """
        mu = torch.sigmoid(self.gates / self._temperature)

        def mix(index: int, state_BTS: Tensor) -> Tensor:
            read_NS = self.taps[index](taps_ND[index].to(self.gates))
            return mu[index] * state_BTS + (1 - mu[index]) * layout.unpack(read_NS)

        start_BTS = layout.unpack(self.start(embeddings_NE.to(self.gates)))
        token = _MIX.set(mix)
        try:
            return call_decoder(
                self.stack, start_BTS, layout.mask_BT, positions_BT=layout.positions_BT, cache=cache, **more
            )
        finally:
            _MIX.reset(token)


@final
class SideNetwork(nn.Module):
    """The side network of a decoder; its parameters are all that the side method trains.

    Args:
        config: What it is like.
        model_config: The backbone's configuration.
        geometry: The backbone's widths and family.

    Attributes:
        config: As given.
        blocks: The tapped blocks of the backbone, by number.
        side: The stack of side blocks.
        up: From the side width to that of the state that the head reads.
        gate: beta, or None when the output stands alone.

    Raises:
        ConfigError: The configuration names blocks that the model does not have.
        ModelError: The family's class does not take the reduced widths.
    """

    def __init__(self, config: SideConfig, model_config: PretrainedConfig, geometry: Geometry) -> None:
        super().__init__()
        text_config = model_config.get_text_config()
        self.config = config
        self.blocks = config.blocks(geometry.num_blocks)
        self._family = geometry.family
        self._backbone_config = text_config
        small = reduced_config(text_config, config.reduction, self.blocks)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(config.seed)
            stack = reduced_decoder(small, geometry.family)
            widths = (geometry.embedding_width, text_config.hidden_size, small.hidden_size)
            blocks = cast("nn.ModuleList", stack.get_submodule(geometry.family.blocks))
            self.side = SideStack(stack, list(blocks), widths, config.temperature)
            self.up = nn.Linear(small.hidden_size, geometry.final_width)
        if config.zero_upsample:
            nn.init.zeros_(self.up.weight)
            nn.init.zeros_(self.up.bias)
        self.gate = nn.Parameter(torch.zeros(())) if config.output == "add" else None

    def start(self, model: PreTrainedModel, examples: Iterable[Mapping[str, Tensor]] | None = None) -> None:
        """Begin as `config.init` says.

        Args:
            model: The whole causal model, with its weights, in eval mode; for Fisher scores in fp32.
            examples: For Fisher scores: what the model is called with, labels among it; one example each.

        Raises:
            ConfigError: Fisher scores without examples.
            ModelError: The family's blocks are not understood.
        """
        path = self._family.decoder
        decoder = model.get_submodule(path)
        if self.config.init == "magnitude":
            self.start_from(decoder, magnitude_scores(decoder))
        elif self.config.init == "fisher":
            self.start_from(decoder, fisher_scores(model, path, examples or ()))

    @torch.no_grad()
    def start_from(self, decoder: nn.Module, scores: Scores) -> None:
        """Copy the highest-scoring channels of the backbone into the side blocks, and begin by reading just these.

        Args:
            decoder: The backbone's own, with its weights.
            scores: Of each of them; see `peft.prune`.

        Raises:
            ModelError: The family's blocks are not understood.
        """
        blocks = self._family.blocks
        small = Stack(self.side.stack, blocks, cast("Any", self.side.stack).config)
        residual_S = copy_pruned(Stack(decoder, blocks, self._backbone_config), small, self.blocks, scores)
        self.side.read_channels(residual_S)

    def new_cache(self) -> Cache:
        """Return an empty cache for the side blocks' keys and values."""
        return DynamicCache(config=cast("Any", self.side.stack).config)

    def forward(
        self, embeddings_NE: Tensor, taps: Taps, layout: Layout, select_M: Tensor, cache: Cache | None = None
    ) -> Tensor:
        """Return the states that the head reads, shape (M, F), at the tokens that the taps' final states are of.

        Args:
            embeddings_NE: Word embeddings of the real tokens.
            taps: What the frozen blocks gave for them.
            layout: How these tokens lie in the padded batch.
            select_M: Which of the N tokens are wanted, int64.
            cache: The side blocks' keys and values of earlier tokens, extended in place.
        """
        state_BTS = self.side(embeddings_NE, taps.blocks, layout, cache)
        up_MF: Tensor = self.up(layout.pack(state_BTS).index_select(0, select_M.to(state_BTS.device)))
        if self.gate is None:
            return up_MF
        return taps.final_MD.to(up_MF) + torch.sigmoid(self.gate / self.config.temperature) * up_MF


def _mix_before(
    index: int,
) -> Callable[[nn.Module, tuple[Any, ...], dict[str, Any]], tuple[tuple[Any, ...], dict[str, Any]]]:
    def hook(
        _block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        mix = _MIX.get()
        if "hidden_states" in kwargs:
            return args, {**kwargs, "hidden_states": mix(index, kwargs["hidden_states"])}
        return (mix(index, args[0]), *args[1:]), kwargs

    return hook
