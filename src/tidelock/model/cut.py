"""Cuts an unchanged `transformers` decoder into prologue, blocks and epilogue, with a hook at every site.

The decoder's own `forward` runs on a skeleton of it in which every block is a stub. The stubs record what their block
was called with (masks, positions, rotary embeddings: each block's own, since Gemma alternates sliding and full masks)
and hand on their input; the last stub, knowing all the calls, has the blocks run one by one by whoever asked, and the
decoder's own final norm follows. So no model class is rewritten and no family's masks are rebuilt here.

It decides nothing about gradients; `model.walk` does. May import errors, `model` and libraries.
"""

from __future__ import annotations

import copy
from contextvars import ContextVar
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol, cast, final

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from tidelock.errors import ConfigError, ModelError
from tidelock.model.attention import join_rows
from tidelock.model.call import call_decoder
from tidelock.model.frames import Frames
from tidelock.model.geometry import Place, SiteId, geometry_of

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from transformers import Cache, PreTrainedModel

    from tidelock.model.rows import Layout, Rows


class SiteVisitor(Protocol):
    """Whoever runs the blocks: told when a block reaches a site."""

    def enter_site(self, site: SiteId, x_BTD: Tensor) -> Tensor:
        """Return what a projection of an attention's site shall read instead of `x_BTD`."""
        ...

    def leave_projection(self, site: SiteId, projection: str, y_BTW: Tensor) -> Tensor:
        """Return what a projection of an attention's site shall give instead of `y_BTW`."""
        ...

    def leave_output(self, site: SiteId, y_BTD: Tensor) -> Tensor:
        """Return what the linear at an output's site shall give instead of `y_BTD`."""
        ...


@final
@dataclass(frozen=True, slots=True)
class BlockCall:
    """One block and the arguments, other than the hidden state, that its decoder called it with."""

    block: nn.Module
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    state_is_keyword: bool

    def __call__(self, hidden_BTD: Tensor) -> Tensor:
        """Return the block's output hidden state, shape (B, T, D)."""
        if self.state_is_keyword:
            result = self.block(*self.args, **self.kwargs, hidden_states=hidden_BTD)
        else:
            result = self.block(hidden_BTD, *self.args, **self.kwargs)
        return cast("Tensor", result[0] if isinstance(result, tuple) else result)


@final
@dataclass(slots=True)
class _Trace:
    """What the stubs have recorded in one forward of the skeleton."""

    run_blocks: Callable[[Sequence[BlockCall], Tensor], Tensor]
    calls: list[BlockCall]


# Per thread, so that one skeleton and one set of hooks serve any number of passes at once.
_TRACE: ContextVar[_Trace] = ContextVar("tidelock_trace")
_VISITOR: ContextVar[SiteVisitor | None] = ContextVar("tidelock_visitor", default=None)


@final
class _BlockStub(nn.Module):
    """Stands for a block in the skeleton: records the call, hands on the hidden state."""

    def __init__(self, block: nn.Module, *, is_last: bool, returns_tuple: bool) -> None:
        super().__init__()
        # Not registered as a child: the skeleton must not own the block.
        self.__dict__["_block"] = block
        self._is_last = is_last
        self._returns_tuple = returns_tuple

    def __getattr__(self, name: str) -> Any:  # noqa: ANN401  (as the base class has it)
        # Decoders read facts off their blocks (Gemma: attention_type); they are the real block's.
        return getattr(self.__dict__["_block"], name)

    def forward(self, *args: Any, **kwargs: Any) -> Tensor | tuple[Tensor]:
        trace = _TRACE.get()
        state_is_keyword = "hidden_states" in kwargs
        if state_is_keyword:
            kwargs = dict(kwargs)
            hidden_BTD = kwargs.pop("hidden_states")
        else:
            hidden_BTD, *args = args  # type: ignore[assignment]
        trace.calls.append(BlockCall(self.__dict__["_block"], tuple(args), kwargs, state_is_keyword))
        if self._is_last:
            hidden_BTD = trace.run_blocks(trace.calls, hidden_BTD)
        return (hidden_BTD,) if self._returns_tuple else hidden_BTD


@final
class CutModel:
    """A frozen decoder whose blocks can be run one by one.

    Safe to use from several threads at once.

    Args:
        model: The whole causal model. It is put in eval mode and frozen: dropout inside the frozen blocks is always
            off, so that a pass can be repeated and cached.

    Attributes:
        geometry: Its widths, and where its sites are.
        config: Its configuration.
        frames: Between which modules may be.

    Raises:
        ModelError: The architecture cannot be cut.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        model.eval().requires_grad_(requires_grad=False)
        self.geometry = geometry_of(model)
        self.config = model.config.get_text_config()
        family = self.geometry.family
        self._decoder = model.get_submodule(family.decoder)
        self._blocks = list(cast("nn.ModuleList", self._decoder.get_submodule(family.blocks)))
        self.frames = Frames(self.geometry, self.device, self.dtype, self.weight)
        if family.joins_rows:
            join_rows(model)
        self._hook_sites()
        self._skeleton = self._make_skeleton(returns_tuple=self._blocks_return_tuples())

    @property
    def dtype(self) -> torch.dtype:
        """The dtype that the frozen blocks compute in."""
        return next(self._decoder.parameters()).dtype

    @property
    def device(self) -> torch.device:
        """Where the frozen blocks are."""
        return next(self._decoder.parameters()).device

    def parameters(self) -> Iterator[nn.Parameter]:
        """Yield the frozen weights."""
        return self._decoder.parameters()

    def weight(self, site: SiteId, projection: str) -> Tensor:
        """Return the frozen weight of a projection of an attention, shape (W, D).

        Raises:
            ConfigError: It is quantised: what follows from it is not what follows from the stored one.
        """
        attention = self._blocks[site.block].get_submodule(self.geometry.family.attention)
        linear = attention.get_submodule(projection)
        weight = cast("Tensor", linear.weight)
        if not weight.is_floating_point():
            msg = (
                f"Frames of the SVD: expected blocks whose weights are as they are stored, got quantised ones "
                f"({weight.dtype}). Use --core-frames seeded, or a cloud with --dtype fp32 or bf16."
            )
            raise ConfigError(msg)
        return weight.T if isinstance(linear, Conv1D) else weight

    def layout(self, rows: Rows, *, generates: bool = False) -> Layout:
        """Return how rows are laid out for this decoder.

        Args:
            rows: Those of a batch.
            generates: Whether a cache is filled: a row padded at the left then counts its positions from its first
                real token.
        """
        joined = self.geometry.family.joins_rows and not generates
        return rows.layout(self.device, counted=generates, joined=joined)

    def run(
        self,
        embeddings_BTE: Tensor,
        layout: Layout,
        run_blocks: Callable[[Sequence[BlockCall], Tensor], Tensor],
        cache: Cache | None = None,
    ) -> Tensor:
        """Return the decoder's final state, shape (B, T, D), with the blocks run by `run_blocks`.

        Args:
            embeddings_BTE: Word embeddings, as the model's own embedding module gives them.
            layout: How they are laid out, over the cached positions too when there is a cache.
            run_blocks: Gets the calls of all blocks, in order, and the first block's input; returns the last one's
                output.
            cache: Keys and values of earlier tokens, extended in place.
        """
        token = _TRACE.set(_Trace(run_blocks, []))
        try:
            return call_decoder(self._skeleton, embeddings_BTE, layout, cache=cache)
        finally:
            _TRACE.reset(token)

    def _make_skeleton(self, *, returns_tuple: bool) -> nn.Module:
        """Return a copy of the decoder that shares everything with it but has stubs for blocks."""
        stubs = nn.ModuleList(
            _BlockStub(block, is_last=index == len(self._blocks) - 1, returns_tuple=returns_tuple)
            for index, block in enumerate(self._blocks)
        )
        skeleton = copy.copy(self._decoder)
        skeleton.__dict__["_modules"] = {**self._decoder._modules, self.geometry.family.blocks: stubs}  # noqa: SLF001
        return skeleton

    @torch.no_grad()
    def _blocks_return_tuples(self) -> bool:
        """Return whether the decoder expects tuples from its blocks, seen from what they return to it.

        Raises:
            ModelError: The decoder does not call each block once.
        """
        returned: list[bool] = []

        def look(_block: nn.Module, _args: object, output: object) -> None:
            returned.append(isinstance(output, tuple))

        handles = [block.register_forward_hook(look) for block in self._blocks]
        embeddings_BTE = torch.zeros(1, 2, self.geometry.embedding_width, dtype=self.dtype, device=self.device)
        mask_BT = torch.ones(1, 2, dtype=torch.long, device=self.device)
        try:
            self._decoder(inputs_embeds=embeddings_BTE, attention_mask=mask_BT, use_cache=False, return_dict=True)
        finally:
            for handle in handles:
                handle.remove()
        if len(returned) != len(self._blocks):
            msg = (
                f"Cutting {type(self._decoder).__name__}: expected it to call each of its {len(self._blocks)} blocks "
                f"once, got {len(returned)} calls. This architecture cannot be cut."
            )
            raise ModelError(msg)
        return returned[0]

    def _hook_sites(self) -> None:
        for site_id, site in self.geometry.sites.items():
            block = self._blocks[site_id.block]
            if site_id.place is not Place.ATTN:
                linear = block.get_submodule(self.geometry.family.outputs[site_id.place.label])
                linear.register_forward_hook(_leave_output(site_id))
                continue
            attention = block.get_submodule(self.geometry.family.attention)
            for projection in site.projections:
                linear = attention.get_submodule(projection.name)
                linear.register_forward_pre_hook(_enter(site_id))
                linear.register_forward_hook(_leave_projection(site_id, projection.name))


def visiting(visitor: SiteVisitor, call: BlockCall, hidden_BTD: Tensor) -> Tensor:
    """Return the output of one block, with `visitor` told when it reaches its site."""
    token = _VISITOR.set(visitor)
    try:
        return call(hidden_BTD)
    finally:
        _VISITOR.reset(token)


def _enter(site: SiteId) -> Callable[[nn.Module, tuple[Tensor]], tuple[Tensor] | None]:
    def hook(_module: nn.Module, args: tuple[Tensor]) -> tuple[Tensor] | None:
        visitor = _VISITOR.get()
        return None if visitor is None else (visitor.enter_site(site, args[0]),)

    return hook


def _leave_projection(site: SiteId, projection: str) -> Callable[[nn.Module, tuple[Tensor], Tensor], Tensor | None]:
    def hook(_module: nn.Module, _args: tuple[Tensor], output: Tensor) -> Tensor | None:
        visitor = _VISITOR.get()
        return None if visitor is None else visitor.leave_projection(site, projection, output)

    return hook


def _leave_output(site: SiteId) -> Callable[[nn.Module, tuple[Tensor], Tensor], Tensor | None]:
    def hook(_module: nn.Module, _args: tuple[Tensor], output: Tensor) -> Tensor | None:
        visitor = _VISITOR.get()
        return None if visitor is None else visitor.leave_output(site, output)

    return hook
