"""Which channels each axis of a block's weights counts, so that a block can be cut down to some of them consistently.

Channels come in groups: the residual stream, which all blocks of a stack share; each key head's queries and keys, which
are multiplied with each other; each value head's values, which the output projection reads; the feed-forward layer. An
axis runs over one group or over several, one after another. Families differ in how their weights lay them out, which
the table says by the names of linears.

May import errors and libraries.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, final

from torch import nn
from transformers.pytorch_utils import Conv1D

from tidelock.errors import ModelError

if TYPE_CHECKING:
    from transformers import PretrainedConfig

Axis = Literal[
    "residual",
    "queries",
    "keys",
    "values",
    "mixed",  # each query head's mixture of values
    "one head",  # a norm that all heads share
    "queries, keys, values",
    "interleaved",  # each head's queries, keys and values
    "feed-forward",
    "gate and up",
    "encoder's residual",
    "whole",  # no channels: T5's table of relative positions
]

# Linears by the end of their name: what their outputs and inputs count.
_LINEARS: dict[str, tuple[Axis, Axis]] = {
    "q_proj": ("queries", "residual"),
    "k_proj": ("keys", "residual"),
    "v_proj": ("values", "residual"),
    "qkv_proj": ("queries, keys, values", "residual"),
    "c_attn": ("queries, keys, values", "residual"),
    "query_key_value": ("interleaved", "residual"),
    "o_proj": ("residual", "mixed"),
    "out_proj": ("residual", "mixed"),
    "attention.dense": ("residual", "mixed"),
    "self_attention.dense": ("residual", "mixed"),
    "self_attn.dense": ("residual", "mixed"),
    "attn.c_proj": ("residual", "mixed"),
    "gate_proj": ("feed-forward", "residual"),
    "up_proj": ("feed-forward", "residual"),
    "gate_up_proj": ("gate and up", "residual"),
    "fc1": ("feed-forward", "residual"),
    "c_fc": ("feed-forward", "residual"),
    "dense_h_to_4h": ("feed-forward", "residual"),
    "down_proj": ("residual", "feed-forward"),
    "fc2": ("residual", "feed-forward"),
    "mlp.c_proj": ("residual", "feed-forward"),
    "dense_4h_to_h": ("residual", "feed-forward"),
    # T5, and the cross-attention of both encoder-decoders. The longest end that fits counts.
    "q": ("queries", "residual"),
    "k": ("keys", "residual"),
    "v": ("values", "residual"),
    "o": ("residual", "mixed"),
    "EncDecAttention.k": ("keys", "encoder's residual"),
    "EncDecAttention.v": ("values", "encoder's residual"),
    "encoder_attn.k_proj": ("keys", "encoder's residual"),
    "encoder_attn.v_proj": ("values", "encoder's residual"),
    "wi": ("feed-forward", "residual"),
    "wi_0": ("feed-forward", "residual"),
    "wi_1": ("feed-forward", "residual"),
    "wo": ("residual", "feed-forward"),
}

_HEAD_NORMS: dict[str, Axis] = {"q_norm": "queries", "k_norm": "keys"}


@final
@dataclass(frozen=True, slots=True)
class Heads:
    """The heads of an attention.

    Attributes:
        count: Query heads.
        groups: Key and value heads; each serves count / groups query heads.
        width: Channels of one head.
        rotary: How many of these rotary embedding turns, channel i together with i + rotary / 2; 0 without it.
    """

    count: int
    groups: int
    width: int
    rotary: int

    @classmethod
    def of(cls, config: PretrainedConfig) -> Heads:
        """Return the heads that a configuration states."""
        count = config.num_attention_heads
        groups = getattr(config, "num_key_value_heads", None) or count
        width = getattr(config, "head_dim", None) or config.hidden_size // count
        rope = getattr(config, "rope_parameters", None)
        return cls(count, groups, width, int(width * rope.get("partial_rotary_factor", 1.0)) if rope else 0)


@final
@dataclass(frozen=True, slots=True)
class Group:
    """Channels of which some are kept, the same ones wherever they are counted.

    Attributes:
        kind: What they are.
        where: The part of the block that they belong to; empty for the residual stream.
        head: The key and value head that they belong to.
    """

    kind: Literal["residual", "query-key", "value", "feed-forward", "whole"]
    where: str = ""
    head: int = 0


RESIDUAL = Group("residual")
ENCODER_RESIDUAL = Group("residual", "encoder")
WHOLE = Group("whole")  # an axis of which everything is kept


Axes = tuple[tuple[Group, ...], ...]


def axes_of(block: nn.Module, heads: Heads) -> dict[str, Axes]:
    """Return, for each parameter of a block, the groups that each of its axes counts, in order and of equal sizes.

    Raises:
        ModelError: A linear is not in the table.
    """
    owners = [
        (path, module, name)
        for path, module in block.named_modules()
        for name, _ in module.named_parameters(recurse=False)
    ]
    # A norm over one head's channels serves all heads: they must keep the same ones.
    alike = any(_is_of_one_head(path, module, name, heads) for path, module, name in owners)
    groups = _Groups(heads, alike=alike)
    return {f"{path}.{name}": _axes(path, module, name, groups) for path, module, name in owners}


@final
class _Groups:
    """Makes the groups of an axis."""

    def __init__(self, heads: Heads, *, alike: bool) -> None:
        self.heads = heads
        self._alike = alike

    def of(self, axis: Axis, where: str) -> tuple[Group, ...]:
        """Return the groups of an axis in one part of the block."""
        heads = self.heads
        keys = [Group("query-key", where, 0 if self._alike else head) for head in range(heads.groups)]
        values = [Group("value", where, head) for head in range(heads.groups)]
        served = [head * heads.groups // heads.count for head in range(heads.count)]
        queries = [keys[head] for head in served]
        every: dict[Axis, list[Group]] = {
            "residual": [RESIDUAL],
            "queries": queries,
            "keys": keys,
            "values": values,
            "mixed": [values[head] for head in served],
            "one head": keys[:1],
            "queries, keys, values": [*queries, *keys, *values],
            "interleaved": [group for key, value in zip(keys, values, strict=True) for group in (key, key, value)],
            "feed-forward": [Group("feed-forward")],
            "gate and up": [Group("feed-forward")] * 2,
            "encoder's residual": [ENCODER_RESIDUAL],
            "whole": [WHOLE],
        }
        return tuple(every[axis])


def _axes(path: str, module: nn.Module, name: str, groups: _Groups) -> Axes:
    where, _, last = path.rpartition(".")
    if isinstance(module, nn.Embedding):
        return (groups.of("whole", where),) * 2
    if not isinstance(module, nn.Linear | Conv1D):
        if _is_of_one_head(path, module, name, groups.heads):
            return (groups.of("one head", where),)
        return (groups.of(_HEAD_NORMS.get(last, "residual"), where),)
    ends = [end for end in _LINEARS if f".{path}".endswith(f".{end}")]
    if not ends:
        msg = (
            f"Pruning a block: expected linears named like {', '.join(list(_LINEARS)[:6])}, got {path!r}. Start "
            "this model's side network with init 'random'."
        )
        raise ModelError(msg)
    outputs, inputs = (groups.of(axis, where) for axis in _LINEARS[max(ends, key=len)])
    if name == "bias":
        return (outputs,)
    return (inputs, outputs) if isinstance(module, Conv1D) else (outputs, inputs)


def _is_of_one_head(path: str, module: nn.Module, name: str, heads: Heads) -> bool:
    return path.rpartition(".")[2] in _HEAD_NORMS and module.get_parameter(name).shape[-1] == heads.width
