"""Reads: one call of PyTorch's CPU flash attention each, some query rows against some slots of the KV memory.

The flash attention reads strided K and V in place, also with heads repeated by stride 0, and returns the log-sum-exp
of the scores beside the output, by which several reads of the same row are merged.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch

from preble.kernels.runs import Run, slots_of, tokens_in

_flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default

Rows = slice | torch.Tensor
"""Rows of a batch: consecutive, or int64 [rows]."""
Answer = tuple[torch.Tensor, torch.Tensor]
"""Output [rows, kv_heads, group, head_dim] and fp32 log-sum-exp [rows, kv_heads, group] of a read."""


@dataclass(frozen=True, slots=True)
class Operands:
    """What one layer attends with."""

    q: torch.Tensor
    """[N, kv_heads, group, head_dim]."""
    keys: torch.Tensor
    """[1, kv_heads, slots, head_dim], a view of `[slots, kv_heads, head_dim]`; as are the values."""
    values: torch.Tensor
    scale: float
    scratch: torch.Tensor
    """[2, tokens, kv_heads, head_dim] to gather K and V of decodes: memory that is new in every layer is slow."""


class Read(Protocol):
    """Some rows against some slots."""

    @property
    def rows(self) -> Rows: ...

    def __call__(self, operands: Operands) -> Answer: ...


def rows_of(numbers: Sequence[int]) -> Rows:
    """Row numbers as a slice where they are consecutive, which costs no copy."""
    first = numbers[0]
    if all(number == first + i for i, number in enumerate(numbers)):
        return slice(first, first + len(numbers))
    return torch.tensor(numbers)


def _attend(
    q: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, scale: float, bias: torch.Tensor | None
) -> Answer:
    """Non-causal attention, in flash attention's layout [batch, heads, rows, head_dim]."""
    if q.shape[2] == 1 and q.dtype != torch.float32:  # the half precisions are up to ten times slower for one row
        out, lse = _flash(q.expand(-1, -1, 2, -1), keys, values, 0.0, False, attn_mask=bias, scale=scale)
        return out[:, :, :1], lse[:, :, :1]
    return _flash(q, keys, values, 0.0, False, attn_mask=bias, scale=scale)  # type: ignore[no-any-return]


@dataclass(frozen=True, slots=True)
class Source:
    """The slots that a read takes."""

    first: int
    length: int
    index: torch.Tensor | None
    """int64 [length], or None for the slots from `first` on."""

    @classmethod
    def of(cls, runs: Sequence[Run]) -> Source:
        first, length = runs[0]
        if len(runs) == 1:
            return cls(first, length, None)
        return cls(first, tokens_in(runs), torch.from_numpy(slots_of(runs)))

    def take(self, kv: torch.Tensor) -> torch.Tensor:
        """The tokens of an operand, [1, kv_heads, tokens, head_dim]: a view if they are consecutive."""
        if self.index is None:
            return kv.narrow(2, self.first, self.length)
        # Selected by slot, the outermost dimension in memory, so that the heads of a slot are copied together.
        return kv[0].transpose(0, 1).index_select(0, self.index).transpose(0, 1).unsqueeze(0)

    def stream(self, kv: torch.Tensor) -> torch.Tensor:
        """What `take` gives, in the form that few query rows read fastest.

        Half precision reads scattered lines so slowly that a copy, which streams, pays for itself up to twice.
        """
        tokens = self.take(kv)
        return tokens.clone() if self.index is None and kv.dtype != torch.float32 else tokens


@dataclass(frozen=True, slots=True)
class FullRead:
    """Rows that all see all of a source. The group is packed as query length: K and V are read once for all rows."""

    rows: Rows
    source: Source

    def __call__(self, operands: Operands) -> Answer:
        q = operands.q[self.rows].transpose(0, 1)
        shape = q.shape  # [kv_heads, rows, group, head_dim]
        q = q.reshape(1, shape[0], -1, shape[3])
        keys, values = self.source.take(operands.keys), self.source.take(operands.values)
        out, lse = _attend(q, keys, values, operands.scale, None)
        return out.view(shape).transpose(0, 1), lse.view(shape[:3]).transpose(0, 1)


@dataclass(frozen=True, slots=True)
class ChunkRead:
    """Consecutive rows of one sequence, causal over as many tokens, or over any source under a bias [rows, tokens]."""

    rows: slice
    source: Source
    bias: torch.Tensor | None

    def __call__(self, operands: Operands) -> Answer:
        q = operands.q[self.rows].permute(1, 2, 0, 3)  # the KV heads as batch, their group as heads
        keys, values = (
            self.source.take(kv).transpose(0, 1).expand(-1, q.shape[1], -1, -1)
            for kv in (operands.keys, operands.values)
        )
        out, lse = _flash(q, keys, values, 0.0, self.bias is None, attn_mask=self.bias, scale=operands.scale)
        return out.permute(2, 0, 1, 3), lse.permute(2, 0, 1)


@dataclass(frozen=True, slots=True)
class DecodeReads:
    """Decodes with long contexts of their own: read one after the other, answered together."""

    rows: Rows
    numbers: tuple[int, ...]
    """The row of each source."""
    sources: tuple[Source, ...]

    def __call__(self, operands: Operands) -> Answer:
        q, keys, values, scale = operands.q, operands.keys, operands.values, operands.scale
        answers = [
            _attend(q.narrow(0, row, 1), source.stream(keys), source.stream(values), scale, None)
            for row, source in zip(self.numbers, self.sources, strict=True)
        ]
        outs, lses = zip(*answers, strict=True)
        return torch.cat(outs), torch.cat(lses)


@dataclass(frozen=True, slots=True)
class _Batch:
    """Decodes gathered and padded to the longest of them."""

    rows: Rows
    index: torch.Tensor
    """Slots, int64 [rows * tokens]."""
    bias: torch.Tensor | None
    """fp32 [rows, 1, 1, tokens]: minus infinity hides the padding."""

    @classmethod
    def of(cls, tails: Sequence[tuple[int, int, Sequence[Run]]]) -> _Batch:
        """Batch (row, tokens, runs) triples."""
        numbers, lengths, tables = zip(*tails, strict=True)
        firsts = np.array([runs[0][0] for runs in tables])[:, None]
        last = np.array(lengths)[:, None] - 1
        columns = np.arange(max(lengths))
        # Padded with a slot of its own: others may never have been written, and a NaN shines through any bias.
        index = firsts + np.minimum(columns, last)
        for row, runs in enumerate(tables):
            if len(runs) > 1:
                index[row] = runs[0][0]
                index[row, : lengths[row]] = slots_of(runs)
        bias = None
        if min(lengths) < len(columns):
            bias = torch.from_numpy(np.where(columns <= last, np.float32(0), np.float32("-inf")))[:, None, None]
        return cls(rows_of(numbers), torch.from_numpy(index.reshape(-1)), bias)

    def __call__(self, operands: Operands) -> Answer:
        q = operands.q[self.rows]
        shape = (q.shape[0], -1, q.shape[1], q.shape[3])
        keys, values = (
            torch.index_select(kv[0].transpose(0, 1), 0, self.index, out=scratch[: len(self.index)])
            for kv, scratch in zip((operands.keys, operands.values), operands.scratch, strict=True)
        )
        keys, values = keys.view(shape).transpose(1, 2), values.view(shape).transpose(1, 2)
        return _attend(q, keys, values, operands.scale, self.bias)


@dataclass(frozen=True, slots=True)
class DecodeBatches:
    """Decodes with few tokens of their own, gathered and answered a batch at a time."""

    rows: Rows
    batches: tuple[_Batch, ...]

    @classmethod
    def of(cls, tails: Sequence[tuple[int, Sequence[Run]]], most: int) -> DecodeBatches:
        """Batch (row, runs) pairs so that none gathers over `most` tokens, padding included, unless it is one row."""
        batches: list[list[tuple[int, int, Sequence[Run]]]] = []
        triples = [(row, tokens_in(runs), runs) for row, runs in tails]
        for row, tokens, runs in sorted(triples, key=lambda triple: triple[1]):  # so that there is little padding
            if not batches or (len(batches[-1]) + 1) * tokens > most:
                batches.append([])
            batches[-1].append((row, tokens, runs))
        rows = rows_of([row for batch in batches for row, _, _ in batch])
        return cls(rows, tuple(_Batch.of(batch) for batch in batches))

    @property
    def gathered(self) -> int:
        """Tokens of the largest batch: the scratch that it needs."""
        return max(len(batch.index) for batch in self.batches)

    def __call__(self, operands: Operands) -> Answer:
        outs, lses = zip(*(batch(operands) for batch in self.batches), strict=True)
        return torch.cat(outs), torch.cat(lses)
