"""A random paged KV cache on the device, in which everything that no sequence may read is poisoned."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from preble.bench.gpu.place import Place
from preble.kernels.fp8 import decoded, encoded

SPARE_PAGES = 2
"""Pages that no sequence owns; table entries past a sequence's last page point to one of them."""
FP8_NAN = 0x7F


@dataclass(frozen=True, slots=True)
class MadeKV:
    """The KV of one layer."""

    keys: torch.Tensor
    """[slots, kv_heads, head_dim], as are the values."""
    values: torch.Tensor
    scales: dict[str, torch.Tensor]
    """`key_scales` and `value_scales` with fp8, else nothing."""
    tables: torch.Tensor
    """int32 [table_rows, pages_per_row]; there are more rows than sequences."""
    rows: torch.Tensor
    """int32 [B]."""
    context_lengths: torch.Tensor
    """int32 [B]."""
    slots: list[torch.Tensor]
    """int64 [length] for each sequence: where its tokens lie."""

    def exact(self, sequence: int) -> tuple[torch.Tensor, torch.Tensor]:
        """K and V of a sequence's tokens, fp64 [length, kv_heads, head_dim]."""
        k, v = self.keys[self.slots[sequence]], self.values[self.slots[sequence]]
        if not self.scales:
            return k.double(), v.double()
        return (
            decoded(k).double() * self.scales["key_scales"].double()[:, None],
            decoded(v).double() * self.scales["value_scales"].double()[:, None],
        )


def make_kv(
    place: Place,
    lengths: Sequence[int],
    *,
    page_size: int,
    kv_heads: int,
    head_dim: int,
    dtype: torch.dtype,
    fp8: bool = False,
    shared_tokens: int = 0,
    seed: int = 0,
) -> MadeKV:
    """KV for sequences of `lengths` tokens (0 for padding) on pages in random order.

    Sequences of more than `shared_tokens` tokens, a multiple of the page size, have the pages of these in common.
    """
    generator = torch.Generator().manual_seed(seed)
    shared_pages = shared_tokens // page_size
    pages_of = [-(-length // page_size) for length in lengths]
    own_pages = [
        pages - shared_pages * (length > shared_tokens) for pages, length in zip(pages_of, lengths, strict=True)
    ]
    order = torch.randperm(SPARE_PAGES + shared_pages + sum(own_pages), generator=generator)
    spare, shared, own = torch.split(order, [SPARE_PAGES, shared_pages, sum(own_pages)])

    table_rows = len(lengths) + 2
    rows = torch.randperm(table_rows, generator=generator)[: len(lengths)]
    tables = spare[0].repeat(table_rows, max(pages_of, default=0) + 3)
    written = torch.zeros(len(order) * page_size, dtype=torch.bool)
    slots: list[torch.Tensor] = []
    for row, length, pages, mine in zip(rows.tolist(), lengths, pages_of, torch.split(own, own_pages), strict=True):
        table = torch.cat([shared, mine]) if length > shared_tokens else mine
        tables[row, :pages] = table
        places = (table[:, None] * page_size + torch.arange(page_size)).view(-1)[:length]
        written[places] = True
        slots.append(places.to(place.device))

    unwritten = ~written.to(place.device)[:, None, None]
    on_device = place.generator(seed)

    def numbers(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=on_device, device=place.device)

    tensors: list[torch.Tensor] = []
    scales: dict[str, torch.Tensor] = {}
    for name in ("key_scales", "value_scales"):
        exact = numbers(len(written), kv_heads, head_dim)
        if fp8:
            scales[name] = numbers(kv_heads).abs() * 0.01 + 0.005
            tensors.append(encoded(exact / scales[name][:, None]).masked_fill_(unwritten, FP8_NAN))
        else:
            tensors.append(exact.to(dtype).masked_fill_(unwritten, float("nan")))
    keys, values = tensors
    return MadeKV(
        keys,
        values,
        scales,
        tables.int().to(place.device),
        rows.int().to(place.device),
        torch.tensor(lengths, dtype=torch.int32, device=place.device),
        slots,
    )
