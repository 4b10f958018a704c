"""A random paged KV cache in which everything that no sequence may read is poisoned."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from device import DEVICE

from preble.kernels.fp8 import encoded

SPARE_PAGES = 2
"""Pages that no sequence owns; table entries past a sequence's last page point to one of them."""


@dataclass(frozen=True)
class MadeKV:
    """The KV of one layer, on the device of the tests."""

    keys: torch.Tensor
    """[slots, kv_heads, head_dim]; as are the values. uint8 holds e4m3 codes."""
    values: torch.Tensor
    key_scales: torch.Tensor | None
    """fp32 [kv_heads] with uint8, else None; as are the value scales."""
    value_scales: torch.Tensor | None
    tables: torch.Tensor
    """int32 [table_rows, pages_per_row]; there are more rows than sequences."""
    rows: torch.Tensor
    """int32 [B]: the table row of each sequence."""
    context_lengths: torch.Tensor
    """int32 [B]."""
    slots: list[torch.Tensor]
    """int64 [length] for each sequence: where its tokens lie."""


def make_kv(
    lengths: Sequence[int],
    *,
    page_size: int,
    kv_heads: int,
    head_dim: int,
    dtype: torch.dtype,
    seed: int = 0,
    shared_tokens: int = 0,
) -> MadeKV:
    """KV for sequences of `lengths` tokens (0 for padding) on pages in random order.

    Sequences of at least `shared_tokens` tokens, a multiple of the page size, have the pages of these in common.
    Slots that no sequence has written hold NaN.
    """
    assert shared_tokens % page_size == 0
    generator = torch.Generator().manual_seed(seed)
    shared_pages = shared_tokens // page_size
    pages_of = [-(-length // page_size) for length in lengths]
    sharing = [shared_pages > 0 and length >= shared_tokens for length in lengths]
    owned = sum(pages - shared_pages * shares for pages, shares in zip(pages_of, sharing, strict=True))
    order = torch.randperm(shared_pages + owned + SPARE_PAGES, generator=generator).to(torch.int32)
    spare, shared, own = order.split([SPARE_PAGES, shared_pages, owned])

    table_rows = len(lengths) + 2
    rows = torch.randperm(table_rows, generator=generator)[: len(lengths)].to(torch.int32)
    tables = spare[0].repeat(table_rows, max(pages_of, default=0) + 3)
    written = torch.zeros(len(order) * page_size, dtype=torch.bool)
    slots, taken = [], 0
    for row, length, pages, shares in zip(rows.tolist(), lengths, pages_of, sharing, strict=True):
        common = shared if shares else shared[:0]
        table = torch.cat([common, own[taken : taken + pages - len(common)]])
        taken += pages - len(common)
        tables[row, :pages] = table
        places = (table.long()[:, None] * page_size + torch.arange(page_size)).view(-1)[:length]
        written[places] = True
        slots.append(places.to(DEVICE))

    def random_heads() -> tuple[torch.Tensor, torch.Tensor | None]:
        numbers = torch.randn(len(written), kv_heads, head_dim, generator=generator)
        if dtype != torch.uint8:
            return numbers.masked_fill_(~written[:, None, None], float("nan")).to(DEVICE, dtype), None
        scales = torch.rand(kv_heads, generator=generator) * 0.02 + 0.005
        codes = encoded(numbers / scales[:, None]).masked_fill_(~written[:, None, None], 0x7F)  # NaN
        return codes.to(DEVICE), scales.to(DEVICE)

    keys, key_scales = random_heads()
    values, value_scales = random_heads()
    context_lengths = torch.tensor(lengths, dtype=torch.int32)
    return MadeKV(
        keys,
        values,
        key_scales,
        value_scales,
        tables.to(DEVICE),
        rows.to(DEVICE),
        context_lengths.to(DEVICE),
        slots,
    )
