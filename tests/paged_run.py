"""Runs a model step by step over a paged KV cache whose pages are scattered, as an engine would."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence

import torch

from preble.engine.batch import ForwardBatch, Model, SequenceSlice
from preble.engine.kv_cache import KVCache


class PagedRun:
    """Sequences by name, each with the tokens it has so far in pages of its own, taken in random order."""

    def __init__(self, model: Model, *, page_size: int = 4, pages: int = 128, seed: int = 0) -> None:
        self.model = model
        self.page_size = page_size
        self.kv = KVCache(
            layers=model.config.layers,
            pages=pages,
            page_size=page_size,
            kv_heads=model.config.kv_heads,
            head_dim=model.config.head_dim,
            dtype=model.dtype,
            device=model.device,
        )
        # What was never written must never be read.
        self.kv.keys.fill_(float("nan"))
        self.kv.values.fill_(float("nan"))
        self._free = random.Random(seed).sample(range(pages), pages)
        self._tables: dict[str, list[int]] = {}
        self._lengths: dict[str, int] = {}

    def step(self, new_tokens: Mapping[str, Sequence[int]], *, logits: int | None = None) -> dict[str, torch.Tensor]:
        """Append tokens to sequences in one forward pass.

        Gives the logits [rows, vocabulary] of each sequence: of its last `logits` new tokens, by default of all.
        """
        token_ids: list[int] = []
        positions: list[int] = []
        slots: list[int] = []
        rows: list[int] = []
        row_counts: list[int] = []
        sequences: list[SequenceSlice] = []
        for name, tokens in new_tokens.items():
            start = self._lengths.get(name, 0)
            self._lengths[name] = end = start + len(tokens)
            table = self._tables.setdefault(name, [])
            while len(table) * self.page_size < end:
                table.append(self._free.pop())
            sequences.append(SequenceSlice(len(token_ids), len(tokens), end, self._runs(table, end)))
            token_ids += tokens
            positions += range(start, end)
            slots += [self._slot(table, position) for position in range(start, end)]
            row_counts.append(len(tokens) if logits is None else logits)
            rows += range(len(token_ids) - row_counts[-1], len(token_ids))
        batch = ForwardBatch(
            token_ids=torch.tensor(token_ids),
            positions=torch.tensor(positions),
            slots=torch.tensor(slots),
            sequences=sequences,
            logit_rows=torch.tensor(rows, dtype=torch.int64),
        )
        result = self.model.forward(batch, self.kv)
        return dict(zip(new_tokens, result.split(row_counts), strict=True))

    def share(self, source: str, name: str, length: int) -> None:
        """Start a sequence whose first `length` tokens, whole pages, lie where those of `source` do."""
        assert length % self.page_size == 0
        self._tables[name] = self._tables[source][: length // self.page_size]
        self._lengths[name] = length

    def _slot(self, table: list[int], position: int) -> int:
        return table[position // self.page_size] * self.page_size + position % self.page_size

    def _runs(self, table: list[int], end: int) -> tuple[tuple[int, int], ...]:
        runs: list[tuple[int, int]] = []
        for position in range(end):
            slot = self._slot(table, position)
            if runs and sum(runs[-1]) == slot:
                runs[-1] = (runs[-1][0], runs[-1][1] + 1)
            else:
                runs.append((slot, 1))
        return tuple(runs)
