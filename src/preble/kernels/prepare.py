"""The inputs of a step, made on the GPU from the rows that it holds of every request.

The host launches a step before it knows what the one before has sampled. So each request has a row on the GPU, with its
page table and the token it sampled last, and per step the host sends only what it does know: new pages, and which
tokens of which rows are computed. The rest follows from the rows.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from preble.kernels.launch import launch

_UPDATES = 128
"""Updates of a program."""
_TOKENS = 512
"""Tokens of a program."""

# What a step sends lies anywhere in one packed buffer: kernels that assumed its alignment would be compiled anew.


@triton.jit(do_not_specialize=["count"], do_not_specialize_on_alignment=["updates"])
def _update_tables_kernel(tables, updates, count, tables_stride: tl.constexpr, UPDATES: tl.constexpr):  # type: ignore[no-untyped-def]
    update = tl.program_id(0) * UPDATES + tl.arange(0, UPDATES)
    inside = update < count
    row = tl.load(updates + update * 3, mask=inside, other=-1)
    index = tl.load(updates + update * 3 + 1, mask=inside, other=0)
    page = tl.load(updates + update * 3 + 2, mask=inside, other=0)
    tl.store(tables + row.to(tl.int64) * tables_stride + index, page, mask=row >= 0)


def update_tables(tables: torch.Tensor, updates: torch.Tensor) -> None:
    """Enter pages into page tables.

    tables: int32 [table_rows, pages_per_row].
    updates: int32 [U, 3]: table row, index of the page in the row, page number. A row of -1 is padding. No place is
        named twice.
    """
    launch(
        _update_tables_kernel,
        (triton.cdiv(len(updates), _UPDATES),),
        warps=_UPDATES // 32,
        stages=1,
        tables=tables,
        updates=updates,
        count=len(updates),
        tables_stride=tables.stride(0),
        UPDATES=_UPDATES,
    )


def update_tables_reference(tables: torch.Tensor, updates: torch.Tensor) -> None:
    """`update_tables` in PyTorch."""
    for row, index, page in updates.tolist():
        if row >= 0:
            tables[row, index] = page


@triton.jit(do_not_specialize=["tokens"], do_not_specialize_on_alignment=["chunks", "token_source"])
def _prepare_inputs_kernel(  # type: ignore[no-untyped-def]
    chunks,
    token_source,
    tables,
    last_tokens,
    token_ids,
    positions,
    slots,
    context_lengths,
    rows,
    logit_rows,
    tokens,
    tables_stride: tl.constexpr,
    PAGE_SIZE: tl.constexpr,
    TOKENS: tl.constexpr,
):
    chunk = tl.program_id(0)
    row = tl.load(chunks + chunk * 4)
    position = tl.load(chunks + chunk * 4 + 1)
    count = tl.load(chunks + chunk * 4 + 2)
    start = tl.load(chunks + chunk * 4 + 3)
    end = tl.load(chunks + chunk * 4 + 7, mask=chunk + 1 < tl.num_programs(0), other=tokens)
    if tl.program_id(1) == 0:
        tl.store(context_lengths + chunk, tl.where(count > 0, position + count, 0))
        tl.store(rows + chunk, row)
        if logit_rows is not None:
            tl.store(logit_rows + chunk, start + tl.maximum(count - 1, 0))
    step = tl.program_id(1) * TOKENS + tl.arange(0, TOKENS)
    entry = start + step
    new = step < count
    known = tl.load(token_source + entry, mask=new, other=0)
    sampled = tl.load(last_tokens + row)
    position += step
    page = tl.load(tables + row.to(tl.int64) * tables_stride + position // PAGE_SIZE, mask=new, other=0)
    inside = entry < end
    tl.store(token_ids + entry, tl.where(known >= 0, known, sampled), mask=inside)
    tl.store(positions + entry, tl.where(new, position, 0), mask=inside)
    tl.store(slots + entry, tl.where(new, page * PAGE_SIZE + position % PAGE_SIZE, -1), mask=inside)


def prepare_inputs(
    *,
    chunks: torch.Tensor,
    token_source: torch.Tensor,
    tables: torch.Tensor,
    last_tokens: torch.Tensor,
    page_size: int,
    token_ids: torch.Tensor,
    positions: torch.Tensor,
    slots: torch.Tensor,
    context_lengths: torch.Tensor,
    rows: torch.Tensor,
    logit_rows: torch.Tensor | None = None,
) -> None:
    """Fill the inputs of a forward pass over N flat entries, which B chunks share in order. All tensors are int32.

    A chunk is the new tokens of one request. Its entries reach from its first to the next chunk's first, or to N;
    what its tokens leave of them is padding. So a mixed step has entries and tokens alike, and the bucket of a CUDA
    graph has as many entries for every chunk, and chunks without tokens at its end.

    chunks: [B, 4] contiguous: table row, position of the first token, number of tokens, index of the first entry,
        which is 0 for the first chunk and rises: even a chunk without tokens has an entry.
    token_source: [N]: the token id, or -1 for the one that the row sampled last. Not read for padding.
    tables: [table_rows, pages_per_row] page numbers.
    last_tokens: [table_rows].
    page_size: a power of two.

    Written are
    token_ids, positions, slots: [N]: the token, its position in its request, and `page * page_size + offset`, where
        its K and V go. Padding gets 0, 0 and -1.
    context_lengths: [B]: tokens attended to by the last token of the chunk, itself included; 0 without tokens.
    rows: [B]: the table row of each chunk.
    logit_rows: [B]: the entry of the last token of each chunk; the first entry without tokens.
    """
    entries = len(token_ids)
    launch(
        _prepare_inputs_kernel,
        (len(chunks), triton.cdiv(entries, _TOKENS)),
        warps=4,
        stages=1,
        chunks=chunks,
        token_source=token_source,
        tables=tables,
        last_tokens=last_tokens,
        token_ids=token_ids,
        positions=positions,
        slots=slots,
        context_lengths=context_lengths,
        rows=rows,
        logit_rows=logit_rows,
        tokens=entries,
        tables_stride=tables.stride(0),
        PAGE_SIZE=page_size,
        TOKENS=_TOKENS,
    )


def prepare_inputs_reference(
    *,
    chunks: torch.Tensor,
    token_source: torch.Tensor,
    tables: torch.Tensor,
    last_tokens: torch.Tensor,
    page_size: int,
    token_ids: torch.Tensor,
    positions: torch.Tensor,
    slots: torch.Tensor,
    context_lengths: torch.Tensor,
    rows: torch.Tensor,
    logit_rows: torch.Tensor | None = None,
) -> None:
    """`prepare_inputs` in PyTorch."""
    token_ids.zero_()
    positions.zero_()
    slots.fill_(-1)
    for chunk, (row, first_position, count, first_entry) in enumerate(chunks.tolist()):
        rows[chunk] = row
        context_lengths[chunk] = first_position + count if count else 0
        if logit_rows is not None:
            logit_rows[chunk] = first_entry + max(count - 1, 0)
        for step in range(count):
            entry, position = first_entry + step, first_position + step
            known = token_source[entry]
            token_ids[entry] = known if known >= 0 else last_tokens[row]
            positions[entry] = position
            slots[entry] = tables[row, position // page_size] * page_size + position % page_size
