"""Partial answers of attention: each split of the KV of a row, to be merged by their log-sum-exps."""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True, slots=True)
class Partials:
    """Scratch memory for N query rows in S splits; what is not written by a step is not read by it."""

    out: torch.Tensor
    """fp32 [N, query_heads, S, head_dim]: normalised within the split."""
    lse: torch.Tensor
    """fp32 [N, query_heads, S]: log2 of the sum of exp2(score * log2(e)) over the split."""

    @classmethod
    def allocate(
        cls, *, rows: int, query_heads: int, splits: int, head_dim: int, device: torch.device | str
    ) -> Partials:
        """Uninitialised memory."""
        shape = (rows, query_heads, splits)
        return cls(
            torch.empty(*shape, head_dim, dtype=torch.float32, device=device),
            torch.empty(shape, dtype=torch.float32, device=device),
        )

    @property
    def splits(self) -> int:
        """S."""
        return self.lse.shape[2]
