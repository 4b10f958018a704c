"""Attention by the kernels of this package: Triton's on a GPU, or their references in PyTorch."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from preble.engine.config import ModelConfig
from preble.engine.device.batch import DecodeInputs, DeviceBatch
from preble.engine.kv_cache import KVCache
from preble.kernels.architecture import architecture_of
from preble.kernels.operations import Operations
from preble.kernels.partials import Partials
from preble.kernels.splits import SHARED_SPLITS, WAVES, splits_for, work_items
from preble.kernels.tiles import decode_tile, shared_prefix_tile

SHARED_PROGRAMS_PER_PROCESSOR = 2
"""Programs of shared prefixes that fit a processor at a time: their tiles take half of its memory."""


@dataclass(slots=True)
class _DecodePlan:
    """How the decodes of a forward pass are split, in the layers of one window."""

    starts: torch.Tensor | None
    split_tokens: torch.Tensor
    work: torch.Tensor


class KernelAttention:
    """An `Attention` of two launches at most and a merge: the decodes split by length, the prefill chunks by tiles.

    Args:
        config: of the model.
        operations: which kernels.
        dtype: of the queries.
        device: where everything lies.
        page_size: tokens in a page.
        max_decodes: decodes of a batch at most; scratch memory is reserved for them once.
    """

    def __init__(
        self,
        config: ModelConfig,
        *,
        operations: Operations,
        dtype: torch.dtype,
        device: torch.device,
        page_size: int,
        max_decodes: int,
    ) -> None:
        self.name = operations.name
        self.capturable = operations.capturable
        self.shares_prefixes = True
        self._config = config
        self._operations = operations
        self._device = device
        self._page_size = page_size
        self._processors = architecture_of(device).processors
        self._programs = WAVES * self._processors
        group = config.query_heads // config.kv_heads
        architecture = architecture_of(device)
        self._tile_tokens = decode_tile(architecture, config.head_dim, group, dtype.itemsize).tokens
        self._shared_tile_tokens = shared_prefix_tile(architecture, config.head_dim, dtype.itemsize).tokens
        self._windows = set(config.layer_windows)
        self._batch: DeviceBatch | None = None
        self._plans: dict[int | None, _DecodePlan] = {}
        self._shared_split_tokens = torch.zeros(4, dtype=torch.int32, device=device)[:1]
        most_items = max(work_items(count, config.kv_heads, self._programs) for count in (1, max_decodes))
        self._split_tokens = {window: torch.zeros(4, dtype=torch.int32, device=device)[:1] for window in self._windows}
        self._work = {window: torch.zeros(most_items, dtype=torch.int32, device=device) for window in self._windows}
        rows = max(count * self._splits(count) for count in range(1, max_decodes + 1))
        self._out_scratch = torch.empty(rows * config.query_heads * config.head_dim, dtype=torch.float32, device=device)
        self._lse_scratch = torch.empty(rows * config.query_heads, dtype=torch.float32, device=device)
        self._splits_now = 0
        self._first_split = 0

    def _splits(self, decodes: int) -> int:
        """Partial answers of a decode in a batch of so many, a shared prefix included."""
        shared = SHARED_SPLITS if None in self._config.layer_windows and decodes > 1 else 0
        return splits_for(decodes, self._config.kv_heads, self._processors) + shared

    def _partials(self, decodes: int, splits: int) -> Partials:
        heads, head_dim = self._config.query_heads, self._config.head_dim
        rows = decodes * heads * splits
        return Partials(
            self._out_scratch[: rows * head_dim].view(decodes, heads, splits, head_dim),
            self._lse_scratch[:rows].view(decodes, heads, splits),
        )

    def begin(self, batch: DeviceBatch) -> None:
        self._batch = batch
        decodes = batch.decodes
        if decodes is None:
            return
        count = len(decodes.rows)
        kv_heads = self._config.kv_heads
        self._splits_now = splits_for(count, kv_heads, self._processors)
        self._first_split = 0
        if decodes.shared is not None:
            self._first_split = SHARED_SPLITS
            self._operations.plan_shared_splits(
                decodes.shared.prefix_lengths,
                self._shared_split_tokens,
                kv_heads=kv_heads,
                splits=SHARED_SPLITS,
                tile_tokens=self._shared_tile_tokens,
                programs=SHARED_PROGRAMS_PER_PROCESSOR * self._processors,
            )
        items = work_items(count, kv_heads, self._programs)
        for window in self._windows:
            plan = self._plans[window] = _DecodePlan(
                decodes.shared.starts if decodes.shared is not None and window is None else None,
                self._split_tokens[window],
                self._work[window][:items],
            )
            self._operations.plan_splits(
                decodes.context_lengths,
                plan.split_tokens,
                starts=plan.starts,
                window=window,
                kv_heads=kv_heads,
                splits=self._splits_now,
                tile_tokens=self._tile_tokens,
                programs=self._programs,
                work=plan.work,
            )

    def attend(self, layer: int, q: torch.Tensor, kv: KVCache, scale: float) -> torch.Tensor:
        batch = self._batch
        assert batch is not None
        out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
        count = 0
        if batch.decodes is not None:
            count = len(batch.decodes.rows)
            self._decode(layer, batch.decodes, q[:count], kv, scale, out[:count])
        if batch.extends is not None:
            extends = batch.extends
            self._operations.paged_extend(
                q[count:],
                kv.keys[layer],
                kv.values[layer],
                out[count:],
                tables=batch.tables,
                rows=extends.rows,
                context_lengths=extends.context_lengths,
                query_starts=extends.query_starts,
                tiles=extends.tiles,
                page_size=self._page_size,
                scale=scale,
                window=self._config.layer_windows[layer],
                **kv.scales(layer),
            )
        return out

    def _decode(
        self, layer: int, decodes: DecodeInputs, q: torch.Tensor, kv: KVCache, scale: float, out: torch.Tensor
    ) -> None:
        assert self._batch is not None
        window = self._config.layer_windows[layer]
        plan = self._plans[window]
        keys, values = kv.keys[layer], kv.values[layer]
        first_split = 0 if plan.starts is None else self._first_split
        partials = self._partials(len(q), first_split + self._splits_now)
        if plan.starts is not None:
            assert decodes.shared is not None
            self._operations.shared_prefix_decode(
                q,
                keys,
                values,
                tables=self._batch.tables,
                rows=decodes.rows,
                members=decodes.shared.members,
                prefix_lengths=decodes.shared.prefix_lengths,
                split_tokens=self._shared_split_tokens,
                partials=partials,
                splits=SHARED_SPLITS,
                page_size=self._page_size,
                scale=scale,
                **kv.scales(layer),
            )
        self._operations.paged_decode(
            q,
            keys,
            values,
            out,
            tables=self._batch.tables,
            rows=decodes.rows,
            context_lengths=decodes.context_lengths,
            split_tokens=plan.split_tokens,
            partials=partials,
            splits=self._splits_now,
            first_split=first_split,
            starts=plan.starts,
            page_size=self._page_size,
            scale=scale,
            window=window,
            work=plan.work,
            **kv.scales(layer),
        )
        self._operations.merge_partials(
            partials,
            out,
            context_lengths=decodes.context_lengths,
            split_tokens=plan.split_tokens,
            splits=self._splits_now,
            kv_heads=self._config.kv_heads,
            window=window,
            starts=plan.starts,
            shared_split_tokens=self._shared_split_tokens if plan.starts is not None else None,
            first_split=first_split,
        )
