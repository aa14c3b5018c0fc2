"""Which positions of a batch are real tokens, so that padding never crosses a cut.

Shapes: B rows, T positions a row, N real tokens in all, packed row by row.
May import errors, `model` and libraries.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import accumulate
from typing import TYPE_CHECKING, final

import torch

from tidelock.errors import ConfigError
from tidelock.model.attention import rows_mask

if TYPE_CHECKING:
    from torch import Tensor

# More groups hide more of a link, but each reads all weights once more and holds a place in a cloud.
_MOST_GROUPS = 4
_TOKENS_IN_GROUP = 64


@final
@dataclass(frozen=True, slots=True)
class Rows:
    """The real tokens of a padded batch: one run of them in each row.

    Attributes:
        starts: First real position of each row (0 unless padded at the left).
        lengths: Number of real tokens in each row, at least 1.
        width: Positions a row has, T.
        shared: Tokens that all rows begin with and that are packed once; fewer than any row has, and only where no row
            is padded at the left.
    """

    starts: tuple[int, ...]
    lengths: tuple[int, ...]
    width: int
    shared: int = 0

    @classmethod
    def from_mask(cls, mask_BT: Tensor) -> Rows:
        """Return the rows of an attention mask, cut at the last position that any row uses.

        Args:
            mask_BT: 1 (or True) at real tokens.

        Raises:
            ConfigError: A row has no token, or its tokens are not one run.
        """
        mask_BT = mask_BT.bool().cpu()
        lengths = mask_BT.sum(1)
        starts = mask_BT.int().argmax(1)
        ends = starts + lengths
        positions = torch.arange(mask_BT.shape[1])
        runs = (positions >= starts[:, None]) & (positions < ends[:, None])
        bad = ((runs != mask_BT).any(1) | (lengths == 0)).nonzero()
        if len(bad):
            msg = (
                f"Attention mask: expected one run of at least one real token in every row, got a row with none or "
                f"with a gap (row {int(bad[0])}). Pad on one side only and send no empty rows."
            )
            raise ConfigError(msg)
        return cls(tuple(starts.tolist()), tuple(lengths.tolist()), int(ends.max()))

    @property
    def num_tokens(self) -> int:
        """N, the number of tokens that are packed."""
        return sum(self.lengths) - self.shared * (len(self.lengths) - 1)

    @property
    def is_dense(self) -> bool:
        """Whether there is no padding at all."""
        return self.num_tokens == len(self.lengths) * self.width

    def split(self, count: int | None = None, prefix: int = 0) -> list[Rows]:
        """Return groups of rows, in order, of about as many tokens each, and as wide as their own rows need.

        They share nothing yet: what the rows of a group begin with may be longer than what all rows do.

        Args:
            count: How many groups, or one a row where there are fewer rows; None has these rows alone decide: 4, or
                fewer of 64 tokens or more in the mean.
            prefix: Tokens that all rows begin with, and of which each group will have a copy. They are not counted, and
                groups have as many other tokens in the mean, or more, so that copies cost less than they save.
        """
        ends = list(accumulate(length - prefix for length in self.lengths))
        if count is None:
            count = max(1, min(_MOST_GROUPS, ends[-1] // max(_TOKENS_IN_GROUP, prefix)))
        count = min(count, len(ends))
        cuts = [0]
        for number in range(1, count):
            # Every group has a row: as many rows are left as groups that follow.
            candidates = range(cuts[-1] + 1, len(ends) - (count - number) + 1)
            target = ends[-1] * number / count
            cuts.append(min(candidates, key=lambda cut: abs(ends[cut - 1] - target)))
        return [self._take(first, end) for first, end in zip(cuts, [*cuts[1:], len(ends)], strict=True)]

    def mask(self) -> Tensor:
        """Return the attention mask, int64 of shape (B, T)."""
        positions = torch.arange(self.width)
        starts, lengths = torch.tensor(self.starts)[:, None], torch.tensor(self.lengths)[:, None]
        return ((positions >= starts) & (positions < starts + lengths)).long()

    def indices(self) -> Tensor:
        """Return where each real token is in the flattened batch, int64; a shared prefix is in each row."""
        return self.mask().flatten().nonzero().squeeze(1)

    def layout(self, device: torch.device, *, counted: bool = False, joined: bool = False) -> Layout:
        """Return how these rows are laid out for a decoder.

        Args:
            device: Where the decoder computes.
            counted: Count each row's positions from its first real token; else that is left to the decoder.
            joined: Lay rows of unlike lengths, or that share a prefix, end to end as one, if all begin at their first
                position; for a decoder that can take them so (`model.attention`), and without a cache.

        Raises:
            ConfigError: Rows that share a prefix are not to be joined.
        """
        if joined and not self.is_dense and not any(self.starts):
            return self._joined_layout(device)
        if self.shared:
            msg = (
                f"Rows that share {self.shared} tokens: expected blocks that take rows end to end, got ones that do "
                "not. Send each row whole."
            )
            raise ConfigError(msg)
        mask_BT = self.mask().to(device)
        return Layout(
            mask=mask_BT,
            positions_BT=(mask_BT.cumsum(1) - 1).clamp(min=0) if counted else None,
            indices_N=None if self.is_dense else self.indices().to(device),
            shape_BT=(len(self.lengths), self.width),
        )

    def next_layout(self, past: int, device: torch.device) -> Layout:
        """Return the layout of one more token in every row, after the `past` positions of a cache."""
        count = len(self.lengths)
        mask_BT = torch.cat([self.mask(), torch.ones(count, past + 1 - self.width, dtype=torch.long)], 1).to(device)
        return Layout(mask_BT, mask_BT.sum(1, keepdim=True) - 1, None, (count, 1))

    def _joined_layout(self, device: torch.device) -> Layout:
        """Return one long row: the prefix, and after it what is each row's own, at the positions that it has there."""
        positions = [torch.arange(self.shared), *(torch.arange(self.shared, length) for length in self.lengths)]
        mask = rows_mask(self.lengths, self.shared)
        return Layout(mask, torch.cat(positions)[None].to(device), None, (1, self.num_tokens))

    def _take(self, first: int, end: int) -> Rows:
        starts, lengths = self.starts[first:end], self.lengths[first:end]
        return Rows(starts, lengths, max(start + length for start, length in zip(starts, lengths, strict=True)))


@final
@dataclass(frozen=True, slots=True)
class Layout:
    """How packed tokens lie in the tensors that a decoder is called with: padded rows, or all joined as one.

    Attributes:
        mask: Attention mask, int64 of shape (B, T), over the positions that a cache holds too; of joined rows their
            lengths, as `model.attention` takes them.
        positions_BT: Position of each token in its row, int64; None leaves it to the decoder.
        indices_N: Where each token is in the flattened batch, int64; None when there is no padding.
        shape_BT: Rows, and positions that a row has.
    """

    mask: Tensor
    positions_BT: Tensor | None
    indices_N: Tensor | None
    shape_BT: tuple[int, int]

    def pack(self, x_BTD: Tensor) -> Tensor:
        """Return the real tokens of a padded tensor, shape (N, D)."""
        return pack(x_BTD, self.indices_N)

    def unpack(self, x_ND: Tensor) -> Tensor:
        """Return packed tokens as a padded tensor of shape (B, T, D), zero at padding; differentiable."""
        return unpack(x_ND, self.indices_N, self.shape_BT)


def pack(x_BTD: Tensor, indices_N: Tensor | None) -> Tensor:
    """Return the real tokens of a padded tensor, shape (N, D); `indices_N` None means that all are real."""
    x_SD = x_BTD.reshape(-1, x_BTD.shape[-1])
    return x_SD if indices_N is None else x_SD.index_select(0, indices_N)


def unpack(x_ND: Tensor, indices_N: Tensor | None, shape_BT: tuple[int, int]) -> Tensor:
    """Return packed tokens as a padded tensor of shape (B, T, D), zero at padding; differentiable."""
    rows, width = shape_BT
    if indices_N is None:
        return x_ND.view(rows, width, -1)
    # In place: the zeros are fresh, and pages of them that nothing is copied to take no memory.
    return x_ND.new_zeros(rows * width, x_ND.shape[-1]).index_copy_(0, indices_N, x_ND).view(rows, width, -1)
