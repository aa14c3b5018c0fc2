"""Makes a batch of encoded rows, for ``transformers.Trainer``.

Transformers' own ``DataCollatorForSeq2Seq`` pads on the side and with the token that the tokenizer happens to be set
to, and cannot pad with one that has no padding token; the split needs rows that begin at position 0. Imports `encode`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import final

import torch
from torch.nn.utils.rnn import pad_sequence

from tidelock.data.encode import NO_LOSS


@final
@dataclass(frozen=True, slots=True)
class Collator:
    """Pads rows at the right to the longest of them.

    Args:
        pad_token_id: What fills `input_ids`; any valid id will do, as it is masked and carries no loss.
    """

    pad_token_id: int

    def __call__(self, rows: Sequence[Mapping[str, Sequence[int]]]) -> dict[str, torch.Tensor]:
        """Return ``input_ids``, ``attention_mask`` (1 real, 0 padding) and ``labels`` (-100 at padding).

        Args:
            rows: At least one, with ``input_ids`` and ``labels`` of equal length.

        Returns:
            Three int64 tensors of shape (rows, longest row).
        """
        ids = [torch.tensor(row["input_ids"], dtype=torch.int64) for row in rows]
        labels = [torch.tensor(row["labels"], dtype=torch.int64) for row in rows]
        return {
            "input_ids": pad_sequence(ids, batch_first=True, padding_value=self.pad_token_id),
            "attention_mask": pad_sequence([torch.ones_like(row) for row in ids], batch_first=True),
            "labels": pad_sequence(labels, batch_first=True, padding_value=NO_LOSS),
        }
