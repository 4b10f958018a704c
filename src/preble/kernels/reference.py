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
        slots = [slot for first, length in sequence.runs for slot in range(first, first + length)]
        k = keys[slots].double().repeat_interleave(group, dim=1)  # [context, query_heads, head_dim]
        v = values[slots].double().repeat_interleave(group, dim=1)
        key_positions = torch.arange(sequence.context_length)
        query_positions = key_positions[sequence.context_length - sequence.query_length :, None]
        seen = key_positions <= query_positions
        if window is not None:
            seen &= key_positions > query_positions - window
        rows = slice(sequence.query_start, sequence.query_start + sequence.query_length)
        scores = torch.einsum("qhd,thd->hqt", q[rows].double(), k) * scale
        weights = scores.masked_fill(~seen, float("-inf")).softmax(-1)
        out[rows] = torch.einsum("hqt,thd->qhd", weights, v)
    return out
