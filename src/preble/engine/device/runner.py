"""Runs steps on a device, one step ahead of the host."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import accumulate

import numpy as np
import torch

from preble.engine.device.attention import Attention
from preble.engine.device.batch import DeviceBatch, DeviceModel, ExtendInputs
from preble.engine.device.graphs import DecodeBuffers, DecodeGraphs, ForwardPass, buckets_up_to
from preble.engine.device.queue import Queue, make_queue
from preble.engine.device.rows import RequestRows
from preble.engine.device.sampling import DeviceSampling, samples_on_host
from preble.engine.device.sharing import PrefixSharing
from preble.engine.device.staging import Staging
from preble.engine.device.step import DeviceStep, Ints, LogitRows
from preble.engine.kv_cache import KVCache
from preble.engine.sampler import SamplingState
from preble.kernels.architecture import architecture_of
from preble.kernels.operations import Operations
from preble.kernels.paged_extend import extend_tiles, tile_tokens
from preble.sched.step_plan import Chunk, StepPlan

IN_FLIGHT = 3
"""Buffers between host and device: for the step that runs, the one behind it, and the one being prepared."""


class DeviceRunner:
    """A `Runner` whose requests have rows on the device: page tables, sampling parameters, the token sampled last.

    A step that only decodes runs as a CUDA graph, padded to one of a few sizes. One with prefill chunks runs launch by
    launch, the decodes in its first rows. The tokens that a step samples stay on the device for the next; the host
    reads them a step later. Off CUDA the same code runs without graphs, streams and events.

    Args:
        model: may be shared with other runners of the device.
        operations: which kernels prepare the inputs and sample.
        attention: for this runner alone.
        kv: its pages.
        max_running: requests at once.
        max_batched_tokens: tokens of a step at most.
        ahead: steps to launch before the result of the oldest is read.
        queue: for its work alone; one is made by default.
    """

    def __init__(
        self,
        model: DeviceModel,
        *,
        operations: Operations,
        attention: Attention,
        kv: KVCache,
        max_running: int,
        max_batched_tokens: int,
        ahead: int = 1,
        queue: Queue | None = None,
    ) -> None:
        config, device = model.config, model.device
        self.config = config
        self.device = device
        self.pages = kv.pages
        self.page_size = kv.page_size
        self.max_batched_tokens = max_batched_tokens
        self.attention = attention.name
        self.ahead = ahead
        self._operations = operations
        self._forward = ForwardPass(model, kv, attention)
        self._queue = make_queue(device) if queue is None else queue
        max_running = min(max_running, max_batched_tokens)
        pages_per_row = -(-min(config.context_length, kv.pages * kv.page_size) // kv.page_size)
        with self._queue.use():
            self._tables = torch.zeros(max_running, pages_per_row, dtype=torch.int32, device=device)
            self._rows = RequestRows(max_running)
            self._sampling = DeviceSampling(max_running, config.vocabulary_size, operations=operations, device=device)
            self._staging = Staging(self._queue, device, depth=IN_FLIGHT)
            self._results = [self._queue.host_tensor((max_running,), torch.int32) for _ in range(IN_FLIGHT)]
            self._turn = 0
            self._sharing = PrefixSharing(
                config,
                dtype=model.dtype,
                kv_itemsize=kv.keys.itemsize,
                device=device,
                page_size=kv.page_size,
            )
            self._buckets = buckets_up_to(max_running)
            shared_tiles = self._sharing.tiles(max_running) if attention.shares_prefixes else None
            self._buffers = DecodeBuffers(max_running, self._tables, shared_tiles=shared_tiles)
            variants = [(size, 0) for size in self._buckets]
            if shared_tiles is not None:
                variants += [(size, tiles[0]) for size in self._buckets if (tiles := self._sharing.tiles(size))]
            self._graphs = DecodeGraphs(self._forward, self._buffers, variants)
            self._mixed = DecodeBuffers(max_batched_tokens, self._tables, shared_tiles=shared_tiles)
        self._query_tile = tile_tokens(
            architecture_of(device),
            query_heads=config.query_heads,
            kv_heads=config.kv_heads,
            head_dim=config.head_dim,
            dtype=model.dtype,
        )

    @property
    def graphs(self) -> int:
        """How many CUDA graphs `capture` makes."""
        captured = self._queue.captures and self._forward.model.capturable and self._forward.attention.capturable
        return len(self._graphs.variants) if captured else 0

    def capture(self) -> None:
        """Capture the CUDA graphs, where device, model and attention allow that."""
        if self.graphs:
            with self._queue.use():
                self._graphs.capture()

    def rehearse_decode(self) -> None:
        """Run the largest decode steps on nothing."""
        with self._queue.use():
            for size, tiles in self._graphs.variants:
                if size == self._buckets[-1]:
                    self._forward(self._buffers.batch(size, tiles))

    def lockstep(self, state: SamplingState) -> bool:
        """Whether a request's next step has to wait until its token is known: the host samples for it."""
        return samples_on_host(state)

    def launch(self, plan: StepPlan) -> DeviceStep:
        """Queue a step. Returns before it is computed."""
        decodes = [chunk for chunk in plan.chunks if chunk.count == 1]
        extends = [chunk for chunk in plan.chunks if chunk.count > 1]
        with self._queue.use():
            return self._extend(decodes, extends, plan) if extends else self._decode(decodes, plan)

    def _decode(self, chunks: list[Chunk], plan: StepPlan) -> DeviceStep:
        """A step of decodes alone, padded to a bucket."""
        size = next(bucket for bucket in self._buckets if bucket >= len(chunks))
        more = self._shared(chunks, size)
        logit_rows = LogitRows.of(chunks, plan, every=True)
        inputs, sharing = self._enter(chunks, logit_rows, size, self._buffers, more)
        tiles = self._buffers.share(size, sharing)
        logits = self._graphs.run(size, tiles)
        return self._sample(logits[: len(chunks)], logit_rows, inputs)

    def _extend(self, decodes: list[Chunk], extends: list[Chunk], plan: StepPlan) -> DeviceStep:
        """A step with prefill chunks: the decodes first, and no padding."""
        chunks = [*decodes, *extends]
        counts = np.array([chunk.count for chunk in extends], np.int32)
        contexts = np.array([chunk.start + chunk.count for chunk in extends], np.int32)
        query_starts = np.concatenate([[0], counts.cumsum()]).astype(np.int32)
        tiles = extend_tiles(counts, contexts, self._query_tile)
        entries = len(decodes) + int(counts.sum())
        logit_rows = LogitRows.of(chunks, plan, every=False)
        more = [logit_rows.entries, contexts, query_starts, tiles, *self._shared(decodes, len(decodes))]
        inputs, there = self._enter(chunks, logit_rows, entries, self._mixed, more)
        entries_there, contexts_there, starts_there, tiles_there, *sharing = there
        mixed = self._mixed
        shared_tiles = mixed.share(len(decodes), sharing)
        batch = DeviceBatch(
            token_ids=mixed.token_ids[:entries],
            positions=mixed.positions[:entries],
            slots=mixed.slots[:entries],
            tables=self._tables,
            decodes=mixed.batch(len(decodes), shared_tiles).decodes if decodes else None,
            extends=ExtendInputs(
                rows=inputs.extend_rows,
                context_lengths=contexts_there,
                query_starts=starts_there,
                tiles=tiles_there,
                longest=int(counts.max()),
                longest_context=int(contexts.max()),
            ),
            logit_rows=entries_there,
        )
        return self._sample(self._forward(batch), logit_rows, inputs)

    def _shared(self, decodes: list[Chunk], size: int) -> list[Ints]:
        """Members, prefix lengths and starts of what decodes read together; nothing where they do not."""
        shared = self._sharing.find(decodes, size) if self._buffers.shared is not None else None
        return [] if shared is None else [shared.members, shared.prefix_lengths, shared.starts]

    def _enter(
        self, chunks: list[Chunk], logit_rows: LogitRows, entries: int, buffers: DecodeBuffers, more: list[Ints]
    ) -> tuple[_Sent, list[torch.Tensor]]:
        """Send what the device does not know, and let it make the inputs of the forward pass in `buffers`.

        Fewer decodes than `entries` are padded. `more` is sent along and returned.
        """
        numbers, new, updates = self._rows.place(chunks)
        described = _described(chunks, numbers, entries)
        extend_rows = np.array([number for number, chunk in zip(numbers, chunks, strict=True) if chunk.count > 1])
        sampling = self._sampling.arrays(new)
        sent = self._staging.send(
            [
                updates,
                described,
                _token_source(chunks, entries),
                logit_rows.table_rows(numbers),
                logit_rows.positions,
                extend_rows.astype(np.int32),
                np.array([logit_rows.places[one.chunk] for one in logit_rows.on_host], np.int32),
                *sampling,
                *more,
            ]
        )
        updates_there, described_there, source, sample_rows, positions, extends, host_rows, *rest = sent
        if len(updates):
            self._operations.update_tables(self._tables, updates_there)
        self._sampling.enter(new, rest[: len(sampling)])
        self._operations.prepare_inputs(
            chunks=described_there,
            token_source=source,
            tables=self._tables,
            last_tokens=self._sampling.last_tokens,
            page_size=self.page_size,
            token_ids=buffers.token_ids[:entries],
            positions=buffers.positions[:entries],
            slots=buffers.slots[:entries],
            context_lengths=buffers.context_lengths[: len(described)],
            rows=buffers.rows[: len(described)],
        )
        return _Sent(sample_rows, positions, extends, host_rows), rest[len(sampling) :]

    def _sample(self, logits: torch.Tensor, rows: LogitRows, sent: _Sent) -> DeviceStep:
        """Queue the choice of the next tokens, and their way to the host."""
        self._turn = (self._turn + 1) % len(self._results)
        tokens = self._results[self._turn][: len(logits)]
        host_logits = None
        if rows.on_host:
            picked = logits[sent.host_rows]
            host_logits = self._queue.host_tensor(tuple(picked.shape), picked.dtype)
            host_logits.copy_(picked, non_blocking=True)
        if len(logits):
            tokens.copy_(self._sampling.sample(logits, sent.sample_rows, sent.positions), non_blocking=True)
        return DeviceStep(rows, tokens, host_logits, self._queue.mark())


@dataclass(frozen=True, slots=True)
class _Sent:
    """What was sent for use behind `prepare_inputs`."""

    sample_rows: torch.Tensor
    """int32 [R]: the table row to sample for, or -1."""
    positions: torch.Tensor
    """int32 [R]."""
    extend_rows: torch.Tensor
    """int32 [E]: the table rows of the prefill chunks, aligned as kernels expect, unlike a part of all rows."""
    host_rows: torch.Tensor
    """int32 [H]: the rows of logits from which the host samples."""


def _described(chunks: list[Chunk], numbers: list[int], entries: int) -> Ints:
    """What `prepare_inputs` takes as chunks: those of a bucket of decodes padded to `entries`."""
    counts = [chunk.count for chunk in chunks]
    padded = entries if entries > sum(counts) else len(chunks)
    described = np.zeros((padded, 4), np.int32)
    firsts = [0, *accumulate(counts)][:-1]
    described[: len(chunks)] = np.array([numbers, [chunk.start for chunk in chunks], counts, firsts], np.int32).T
    described[len(chunks) :, 3] = np.arange(len(chunks), padded)
    return described


def _token_source(chunks: list[Chunk], entries: int) -> Ints:
    """int32 [entries]: known token ids; -1 for those that the device alone knows, and for padding."""
    source = np.full(entries, -1, np.int32)
    entry = 0
    for chunk in chunks:
        known = chunk.sequence.tokens[chunk.start : chunk.start + chunk.count]
        source[entry : entry + len(known)] = known
        entry += chunk.count
    return source
