"""Makes a batch of encoded rows, for ``transformers.Trainer``, whether each token has a label or each row one.

Transformers' own ``DataCollatorForSeq2Seq`` pads on the side and with the token that the tokenizer happens to be set
to, and cannot pad with one that has no padding token; the split needs rows that begin at position 0. Imports `encode`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, final

import torch
from torch.nn.utils.rnn import pad_sequence

from tidelock.data.encode import NO_LOSS

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence


@final
@dataclass(frozen=True, slots=True)
class Collator:
    """Pads rows at the right to the longest of them.

    Args:
        pad_token_id: What fills `input_ids`; any valid id will do, as it is masked and carries no loss.
    """

    pad_token_id: int

    def __call__(self, rows: Sequence[Mapping[str, object]]) -> dict[str, torch.Tensor]:
        """Return ``input_ids``, ``attention_mask`` (1 real, 0 padding) and ``labels``.

        Args:
            rows: At least one; all with ``labels`` as long as their ``input_ids`` (`TokenRow`), or all with one
                ``label`` (`SequenceRow`).

        Returns:
            Three tensors of shape (rows, longest row), int64; labels are -100 at padding. With one label a row, they
            are of shape (rows,), int64 for classes and fp32 for numbers.
        """
        ids = [torch.tensor(row["input_ids"], dtype=torch.int64) for row in rows]
        return {
            "input_ids": pad_sequence(ids, batch_first=True, padding_value=self.pad_token_id),
            "attention_mask": pad_sequence([torch.ones_like(row) for row in ids], batch_first=True),
            "labels": _labels(rows),
        }


def _labels(rows: Sequence[Mapping[str, object]]) -> torch.Tensor:
    if "label" in rows[0]:
        dtype = torch.int64 if isinstance(rows[0]["label"], int) else torch.float32
        return torch.tensor([row["label"] for row in rows], dtype=dtype)
    labels = [torch.tensor(row["labels"], dtype=torch.int64) for row in rows]
    return pad_sequence(labels, batch_first=True, padding_value=NO_LOSS)
