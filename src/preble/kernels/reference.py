"""Attention written as its definition: slow, in fp64, and what every kernel is checked against."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from preble.kernels.paged_attention import QuerySlice


def reference_attention(
    q: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    scale: float,
    *,
    sequences: Sequence[QuerySlice],
    window: int | None = None,
) -> torch.Tensor:
    """Attention of q [N, query_heads, head_dim] over keys and values [slots, kv_heads, head_dim]; fp64, q's shape.

    The last query of a sequence stands at position `context_length - 1`; a query sees itself, everything before it,
    and with `window` only the last `window` of these. Rows that belong to no sequence stay zero.
    """
    out = torch.zeros(q.shape, dtype=torch.float64)
    group = q.shape[1] // keys.shape[1]
    for sequence in sequences:
        slots = [slot for start, length in sequence.runs for slot in range(start, start + length)]
        k = keys[slots].double().repeat_interleave(group, dim=1)  # [context, query_heads, head_dim]
        v = values[slots].double().repeat_interleave(group, dim=1)
        for row in range(sequence.query_length):
            position = sequence.context_length - sequence.query_length + row
            first = 0 if window is None else max(0, position - window + 1)
            seen = slice(first, position + 1)
            query = q[sequence.query_start + row].double()
            weights = (torch.einsum("hd,thd->ht", query, k[seen]) * scale).softmax(-1)
            out[sequence.query_start + row] = torch.einsum("ht,thd->hd", weights, v[seen])
    return out
