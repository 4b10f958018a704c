"""Attention over a paged KV cache on the CPU."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch

_flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default


class QuerySlice(Protocol):
    """The rows of one sequence in a batch and where its K and V lie; `preble.engine.batch.SequenceSlice` is one."""

    @property
    def query_start(self) -> int: ...

    @property
    def query_length(self) -> int: ...

    @property
    def context_length(self) -> int: ...

    @property
    def runs(self) -> tuple[tuple[int, int], ...]: ...


class PagedAttention:
    """The attention of one forward pass, planned once and called by every layer."""

    def __init__(self, parts: list[tuple[slice, torch.Tensor, torch.Tensor]], group: int) -> None:
        self._parts = parts
        self._group = group

    @classmethod
    def plan(cls, sequences: Sequence[QuerySlice], *, group: int, window: int | None) -> PagedAttention:
        """Prepare for `sequences`: `group` query heads share a KV head, a query sees the last `window` tokens."""
        parts = []
        for sequence in sequences:
            slots = torch.cat([torch.arange(start, start + length) for start, length in sequence.runs])
            keys = torch.arange(sequence.context_length)
            queries = keys[sequence.context_length - sequence.query_length :, None]
            seen = keys <= queries
            if window is not None:
                seen &= keys > queries - window
            bias = torch.zeros(seen.shape).masked_fill_(~seen, float("-inf"))
            parts.append((slice(sequence.query_start, sequence.query_start + sequence.query_length), slots, bias))
        return cls(parts, group)

    def __call__(self, q: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, scale: float) -> torch.Tensor:
        """Attend with q [N, query_heads, head_dim] to keys and values [slots, kv_heads, head_dim]; gives q's shape."""
        out = torch.empty_like(q)
        for rows, slots, bias in self._parts:
            k, v = (x[slots].transpose(0, 1)[:, None].expand(-1, self._group, -1, -1) for x in (keys, values))
            grouped = q[rows].view(-1, keys.shape[1], self._group, q.shape[2]).permute(1, 2, 0, 3)
            result, _ = _flash(grouped, k, v, 0.0, False, attn_mask=bias.to(q.dtype), scale=scale)
            out[rows] = result.permute(2, 0, 1, 3).flatten(1, 2)
        return out
