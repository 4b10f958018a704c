"""Attention over a paged KV cache on the CPU.

A forward pass is planned once, from the block tables alone, and the plan is called by every layer. It consists of
*reads* of some slots for some query rows; a row that several reads answer has them merged by their log-sum-exps.

- What sequences begin with in common is read once for all of them: one read instead of 32 for 32 requests on one
  2,000-token prefix.
- Long contiguous runs are read where they lie. Short ones cost more to merge than to copy, so they are gathered.
- The few tokens that a decode has for itself are gathered with those of other decodes and answered as one batch.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from typing import Protocol

import torch

from preble.kernels.reads import ChunkRead, DecodeBatches, DecodeReads, FullRead, Operands, Read, Source, rows_of
from preble.kernels.runs import Run, cut, join, split_shared, tokens_in

# All measured on 2 cores with 8 x 64 and 16 x 128 (KV heads x head size), fp32 and bf16.
SHARED_TOKENS = 256
"""Reading a common beginning once pays for the merge when it saves reading this many tokens."""
LONG_RUN = 256
"""Runs of at least this many tokens are read in place, shorter ones gathered."""
SHORT_TAIL = 256
"""Decodes with at most this many tokens of their own are gathered and answered in batches, others alone."""
GATHERED_TAILS = 512
"""Tokens in such a batch, padding included: more would leave the cache."""
LONGEST_READ = 4096
"""Tokens of one read, which are copied unless they are read in place."""
BAND = 256
"""Rows that a prefill under a sliding window answers at a time, over at most `window + BAND - 1` tokens."""


class QuerySlice(Protocol):
    """The new tokens of one sequence and where its K and V lie; `preble.engine.batch.SequenceSlice` is one."""

    @property
    def query_start(self) -> int: ...

    @property
    def query_length(self) -> int: ...

    @property
    def context_length(self) -> int: ...

    @property
    def runs(self) -> tuple[Run, ...]: ...


class PagedAttention:
    """The attention of one forward pass: planned once for each sliding window, called by every layer in turn.

    Plans are independent of each other; one plan must not be called from two threads at once.
    """

    def __init__(self, first: list[Read], more: list[Read], *, rows: int, group: int) -> None:
        self._first = first
        self._more = more
        self._group = group
        self._gathered = max((read.gathered for read in first + more if isinstance(read, DecodeBatches)), default=0)
        self._scratch: torch.Tensor | None = None
        rows_of_first = first[0].rows if first else None
        self._single = not more and isinstance(rows_of_first, slice) and rows_of_first == slice(0, rows)

    @classmethod
    def plan(cls, sequences: Sequence[QuerySlice], *, group: int, window: int | None) -> PagedAttention:
        """Plan the reads of `sequences`, whose rows are all rows of the batch.

        `group` query heads share a KV head. With a `window`, a token sees itself and the `window - 1` tokens before.
        """
        first, *later = _Planner(window).plan(sequences)
        rows = sum(sequence.query_length for sequence in sequences)
        return cls(first, [read for reads in later for read in reads], rows=rows, group=group)

    def __call__(self, q: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, scale: float) -> torch.Tensor:
        """Attend with q [N, query_heads, head_dim] to keys and values [slots, kv_heads, head_dim]: a new tensor like q.

        K and V of the batch's own tokens must already lie in their slots.
        """
        grouped = q.view(q.shape[0], -1, self._group, q.shape[2])
        if self._scratch is None:
            self._scratch = keys.new_empty((2, self._gathered, *keys.shape[1:]))
        operands = Operands(grouped, keys.transpose(0, 1)[None], values.transpose(0, 1)[None], scale, self._scratch)
        if self._single:
            return self._first[0](operands)[0].reshape(q.shape)
        out = torch.empty(grouped.shape, dtype=torch.float32 if self._more else q.dtype)
        lse = torch.empty(grouped.shape[:3], dtype=torch.float32)
        for read in self._first:
            answer, lse[read.rows] = read(operands)
            out[read.rows] = answer.to(out.dtype)
        for read in self._more:
            answer, answer_lse = read(operands)
            so_far = lse[read.rows]
            weight = torch.sigmoid(answer_lse - so_far).unsqueeze(-1)
            out[read.rows] = torch.lerp(out[read.rows], answer.float(), weight)
            lse[read.rows] = torch.logaddexp(so_far, answer_lse)
        return out.view(q.shape).to(q.dtype)


class _Planner:
    """Collects reads in rounds: in each, a row is answered at most once, and in the first exactly once."""

    def __init__(self, window: int | None) -> None:
        self._window = window
        self._rounds: defaultdict[int, list[Read]] = defaultdict(list)
        self._decodes: defaultdict[int, list[tuple[int, Source]]] = defaultdict(list)
        self._tails: defaultdict[int, list[tuple[int, list[Run]]]] = defaultdict(list)

    def plan(self, sequences: Sequence[QuerySlice]) -> list[list[Read]]:
        """The rounds, at least one."""
        done = [0] * len(sequences)  # rounds that have answered a sequence's rows
        for members, runs in split_shared([self._common(sequence) for sequence in sequences], SHARED_TOKENS):
            rows = [row for member in members for row in _rows(sequences[member])]
            now = done[members[0]]  # the same for all members: they have shared everything so far
            if len(rows) == 1 and tokens_in(runs) <= SHORT_TAIL:
                self._tails[now].append((rows[0], runs))
                done[members[0]] += 1
                continue
            for source in _sources(runs):
                if len(rows) == 1:
                    self._decodes[now].append((rows[0], source))
                else:
                    self._rounds[now].append(FullRead(rows_of(rows), source))
                now += 1
            for member in members:
                done[member] = now
        for sequence, now in zip(sequences, done, strict=True):
            if sequence.query_length > 1:
                self._rounds[now].extend(self._chunk(sequence))
        for now, decodes in self._decodes.items():
            numbers, sources = zip(*decodes, strict=True)
            self._rounds[now].append(DecodeReads(rows_of(numbers), numbers, sources))
        for now, tails in self._tails.items():
            self._rounds[now].append(DecodeBatches.of(tails, GATHERED_TAILS))
        return [self._rounds[now] for now in range(max(self._rounds, default=0) + 1)]

    def _banded(self, sequence: QuerySlice) -> bool:
        return sequence.query_length > 1 and self._window is not None and self._window < sequence.context_length

    def _common(self, sequence: QuerySlice) -> list[Run]:
        """What all new tokens of a sequence see, as far as it is not left to `_chunk`."""
        if self._banded(sequence):
            return []
        if sequence.query_length > 1:
            return cut(sequence.runs, 0, sequence.context_length - sequence.query_length)
        first = 0 if self._window is None else max(0, sequence.context_length - self._window)
        return cut(sequence.runs, first, sequence.context_length)

    def _chunk(self, sequence: QuerySlice) -> list[Read]:
        """What the new tokens see of each other, or under a sliding window all that they see."""
        cached = sequence.context_length - sequence.query_length
        if not self._banded(sequence):
            own = join(cut(sequence.runs, cached, sequence.context_length))
            return [ChunkRead(slice(_rows(sequence).start, _rows(sequence).stop), Source.of(own), None)]
        assert self._window is not None
        reads: list[Read] = []
        for begin in range(cached, sequence.context_length, BAND):
            end = min(begin + BAND, sequence.context_length)
            oldest = max(0, begin - self._window + 1)
            ages = torch.arange(begin, end)[:, None] - torch.arange(oldest, end)
            bias = torch.zeros(ages.shape).masked_fill_((ages < 0) | (ages >= self._window), float("-inf"))
            rows = slice(sequence.query_start + begin - cached, sequence.query_start + end - cached)
            reads.append(ChunkRead(rows, Source.of(join(cut(sequence.runs, oldest, end))), bias))
        return reads


def _rows(sequence: QuerySlice) -> range:
    return range(sequence.query_start, sequence.query_start + sequence.query_length)


def _sources(runs: Sequence[Run]) -> list[Source]:
    """Long runs where they lie, the others gathered; the order of tokens that are all seen does not matter."""
    sources = []
    gathered: list[Run] = []
    for first, length in runs:
        if length < LONG_RUN and len(runs) > 1:
            if tokens_in(gathered) + length > LONGEST_READ:
                sources.append(Source.of(gathered))
                gathered = []
            gathered.append((first, length))
            continue
        for begin in range(0, length, LONGEST_READ):
            sources.append(Source.of([(first + begin, min(LONGEST_READ, length - begin))]))
    return [*sources, Source.of(gathered)] if gathered else sources
