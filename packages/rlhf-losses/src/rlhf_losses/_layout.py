"""Where the tokens of a batch are, padded or ragged, and the dense rows that recursions over time run on."""

from __future__ import annotations

import torch
from torch import Tensor

from rlhf_losses.segments import segment_ids


class Layout:
    """Moves values per token to rows without holes, `[N, L]`, first token first, and back.

    Tokens that do not count are left out, so that what follows sees the next token that does; a turn of the user in
    between costs no discount. Rows are float64: recursions are sums of many terms, and float64 products are exempt
    from the TensorFloat-32 that trainers switch on.

    Args:
        like: values of the batch, padded `[B, T]`, or ragged `[T]` with `cu_seqlens`.
        mask: True where a token counts, boolean, the shape of `like`; by default all do.
        cu_seqlens: cumulative sequence lengths from 0 to T, `[N + 1]`, for a ragged batch.

    Attributes:
        lengths: tokens that count in each row, `[N]`.
    """

    def __init__(self, like: Tensor, mask: Tensor | None, cu_seqlens: Tensor | None) -> None:
        if like.ndim != (2 if cu_seqlens is None else 1):
            raise ValueError(
                f"values per token must be padded [B, T], or [T] with cu_seqlens [N + 1]; got {list(like.shape)} "
                f"{'without' if cu_seqlens is None else 'with'} cu_seqlens"
            )
        if mask is not None and (mask.dtype != torch.bool or mask.shape != like.shape):
            raise ValueError(
                f"mask must be boolean {list(like.shape)}, got {mask.dtype} {list(mask.shape)}; pass mask.bool()"
            )
        self.shape = like.shape
        self.mask = torch.ones_like(like, dtype=torch.bool) if mask is None else mask
        if cu_seqlens is None:
            rank = self.mask.cumsum(1)
            rows = torch.arange(len(like), device=like.device)[:, None].expand_as(like)
            self.lengths = self.mask.sum(1)
            self.width = like.shape[1]
        else:
            rows = segment_ids(cu_seqlens, len(like))
            rank = self.mask.cumsum(0)
            before = torch.nn.functional.pad(rank, (1, 0))
            self.lengths = before[cu_seqlens[1:]] - before[cu_seqlens[:-1]]
            rank = rank - before[cu_seqlens[:-1]][rows]
            self.width = int(self.lengths.max()) if len(self.lengths) else 0
        # One more column than a row is long takes in whatever does not count.
        self._index = rows * (self.width + 1) + torch.where(self.mask, rank - 1, self.width)

    def check_sequences(self, values: Tensor, name: str) -> None:
        """Raise if `values` has not one number per sequence."""
        if values.shape != self.lengths.shape:
            raise ValueError(f"{name} must be {list(self.lengths.shape)}, one per sequence, got {list(values.shape)}")

    def pack(self, values: Tensor) -> Tensor:
        """Values of the tokens that count, `[N, L]`, 0 after the end of each row."""
        if values.shape != self.shape:
            raise ValueError(f"values per token must all be {list(self.shape)}, got {list(values.shape)}")
        rows = values.new_zeros(len(self.lengths) * (self.width + 1), dtype=torch.float64)
        rows[self._index.flatten()] = values.flatten().double()
        return rows.view(-1, self.width + 1)[:, : self.width]

    def unpack(self, rows: Tensor) -> Tensor:
        """The inverse of `pack`, in the shape of the batch, float64; 0 for tokens that do not count."""
        return torch.nn.functional.pad(rows, (0, 1)).take(self._index).where(self.mask, 0)
