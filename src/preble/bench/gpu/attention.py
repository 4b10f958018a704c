"""How fast attention is: decode beside a copy, prefill in TFLOP/s, shared prefixes beside plain decode."""

from __future__ import annotations

import gc
from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

from preble.bench.gpu.place import Place, Times, time_work
from preble.bench.gpu.predictions import (
    BATCHES,
    CONTEXTS,
    COPY,
    EXTENDS,
    MIXED,
    SHARED,
    decode_key,
    extend_key,
)
from preble.bench.gpu.random_model import LLAMA_8B, PAGE, TOY, model_config
from preble.bench.gpu.record import Record
from preble.engine.config import ModelConfig
from preble.engine.device.batch import DecodeInputs, DeviceBatch, ExtendInputs, SharedPrefixInputs
from preble.engine.device.kernel_attention import KernelAttention
from preble.engine.kv_cache import FP8, KVCache
from preble.kernels.architecture import architecture_of
from preble.kernels.paged_extend import extend_tiles, tile_tokens
from preble.kernels.shared_prefix import requests_per_tile

MUCH = 400 << 20
"""Bytes of KV to read in turn, several times the L2 cache."""
MOST_LAYERS = 32
SHARE_OF_MEMORY = 0.8
SHARED_REQUESTS, SHARED_PREFIX, SHARED_TAIL = 64, 8192, 128
MIXED_CHUNKS = ((37, 37), (512, 512), (1024, 9216), (129, 4225), (2048, 2048), (700, 3000), (300, 8492), (1500, 1500))
"""(new tokens, context with them)."""


def run_attention(place: Place, record: Record, shard: tuple[int, int]) -> None:
    """Layers of the shape of Llama-3-8B, each with K and V of its own."""
    context = 1024 if place.toy else 40_000
    config = model_config(TOY if place.toy else LLAMA_8B, context)
    bench = _Bench(place, record, config)
    copy = record.ceiling(COPY)
    for context in (100,) if place.toy else CONTEXTS:
        for batch in (2,) if place.toy else BATCHES[::2] if place.quick else BATCHES:
            bench.decode(batch, context, copy)
    bench.decode(*((2, 100) if place.toy else (64, 4096)), copy, fp8=True)
    for tokens in (100,) if place.toy else EXTENDS:
        bench.extend(extend_key(tokens), [(tokens, tokens)])
    bench.extend(MIXED, [(30, 30), (5, 70)] if place.toy else MIXED_CHUNKS)
    bench.shared(*((3, 128, 10) if place.toy else (SHARED_REQUESTS, SHARED_PREFIX, SHARED_TAIL)))
    for name, yardstick in (("SDPA", bench.sdpa), ("flash-attn", bench.flash_attn)):
        try:
            yardstick()
        except Exception as error:  # whatever it lacks, it is only for comparison
            record.note(name, f"not measured: {type(error).__name__}: {str(error)[:200]}")


class _Bench:
    def __init__(self, place: Place, record: Record, config: ModelConfig) -> None:
        self._place = place
        self._record = record
        self._config = config
        self._scale = config.head_dim**-0.5
        self._heads = (config.query_heads, config.head_dim)
        architecture = architecture_of(place.device)
        self._query_tile = tile_tokens(
            architecture,
            query_heads=config.query_heads,
            kv_heads=config.kv_heads,
            head_dim=config.head_dim,
            dtype=place.dtype,
        )
        self._requests_per_tile = requests_per_tile(
            architecture, config.head_dim, place.dtype, group=config.query_heads // config.kv_heads
        )

    def decode(self, batch: int, context: int, copy: float | None, *, fp8: bool = False) -> None:
        """Requests of one length, one new token each."""
        key = decode_key(batch, context) + (", fp8 KV" if fp8 else "")
        pages = -(-context // PAGE)
        layer_bytes = batch * context * self._bytes_per_token(fp8)
        layers = 1 if self._place.toy else max(1, min(MOST_LAYERS, -(-MUCH // layer_bytes)))
        if layers * layer_bytes > SHARE_OF_MEMORY * self._place.free_bytes():
            self._record.note(key, "not measured: it does not fit in the memory of the device")
            return
        kv = self._kv(layers, batch * pages, fp8=fp8)
        tables = torch.randperm(batch * pages, device=self._place.device).int().view(batch, pages)
        inputs = DecodeInputs(self._ints(range(batch)), self._ints([context] * batch))
        work = self._work(kv, batch, self._batch(batch, tables, decodes=inputs))
        times = time_work(self._place, work, parts=layers)
        rate = layer_bytes / times.median / 1e12
        self._rate(key, layer_bytes / 1e12, times, rate, copy)

    def _rate(self, key: str, terabytes: float, times: Times, rate: float, copy: float | None) -> None:
        """Beside the copy's bandwidth where that was measured."""
        if copy is None:
            self._record.rate(key, terabytes, times, "TB/s")
            return
        spread = (100 * terabytes / times.high / copy, 100 * terabytes / times.low / copy)
        self._record.figure(
            key, 100 * rate / copy, "% of copy", spread=spread, seconds=times.median, terabytes_per_second=rate
        )

    def extend(self, key: str, chunks: Sequence[tuple[int, int]]) -> None:
        """Chunks of (new tokens, context with them), in one launch."""
        counts, contexts = np.array(chunks, np.int32).T
        pages = [-(-int(context) // PAGE) for context in contexts]
        layers = 1 if self._place.toy else 4
        kv = self._kv(layers, sum(pages))
        order = torch.randperm(sum(pages), device=self._place.device).int()
        tables = torch.zeros(len(chunks), max(pages), dtype=torch.int32, device=self._place.device)
        for row, mine in enumerate(torch.split(order, pages)):
            tables[row, : len(mine)] = mine
        tiles = extend_tiles(counts, contexts, self._query_tile)
        inputs = ExtendInputs(
            rows=self._ints(range(len(chunks))),
            context_lengths=self._ints(contexts.tolist()),
            query_starts=self._ints([0, *counts.cumsum().tolist()]),
            tiles=torch.from_numpy(tiles).to(self._place.device),
            longest=int(counts.max()),
            longest_context=int(contexts.max()),
        )
        tokens = int(counts.sum())
        work = self._work(kv, tokens, self._batch(tokens, tables, extends=inputs))
        times = time_work(self._place, work, parts=layers)
        self._record.rate(key, self._operations(chunks) / 1e12, times, "TFLOP/s")

    def shared(self, requests: int, prefix: int, tail: int) -> None:
        """Requests on one prefix: read for each of them, and once for all."""
        context, shared_pages = prefix + tail, prefix // PAGE
        own = -(-tail // PAGE)
        layers = 1 if self._place.toy else 8
        kv = self._kv(layers, shared_pages + requests * own)
        order = torch.randperm(shared_pages + requests * own, device=self._place.device).int()
        common = order[:shared_pages].expand(requests, -1)
        tables = torch.cat([common, order[shared_pages:].view(requests, own)], 1).contiguous()
        each = self._requests_per_tile
        tiles = [list(range(first, min(first + each, requests))) for first in range(0, requests, each)]
        sharing = SharedPrefixInputs(
            members=self._ints([tile + [-1] * (each - len(tile)) for tile in tiles]),
            prefix_lengths=self._ints([prefix] * len(tiles)),
            starts=self._ints([prefix] * requests),
        )
        rows, contexts = self._ints(range(requests)), self._ints([context] * requests)
        times = {}
        for name, inputs in (("plain", None), ("shared", sharing)):
            batch = self._batch(requests, tables, decodes=DecodeInputs(rows, contexts, inputs))
            times[name] = time_work(self._place, self._work(kv, requests, batch), parts=layers)
        plain, shared = times["plain"], times["shared"]
        self._record.figure(
            SHARED,
            plain.median / shared.median,
            "x plain",
            spread=(plain.low / shared.high, plain.high / shared.low),
            plain_seconds=plain.median,
            shared_seconds=shared.median,
        )

    def sdpa(self) -> None:
        """PyTorch's own attention on K and V that lie in one piece."""
        toy = self._place.toy
        for backend in (SDPBackend.MATH,) if toy else (SDPBackend.FLASH_ATTENTION, SDPBackend.CUDNN_ATTENTION):
            tokens, decodes, context = (60, 2, 60) if toy else (8192, 32, 4096)
            name = f"SDPA {backend.name.removesuffix('_ATTENTION').lower()}"
            with sdpa_kernel(backend):
                q, k, v = self._contiguous(1, tokens, tokens)
                times = self._time_sdpa(q, k, v, causal=True)
                amount = self._operations([(tokens, tokens)]) / 1e12
                self._record.rate(f"{name}: {extend_key(tokens)}", amount, times, "TFLOP/s")
                q, k, v = self._contiguous(decodes, 1, context)
                times = self._time_sdpa(q, k, v, causal=False)
                amount = decodes * context * self._bytes_per_token(False) / 1e12
                self._record.rate(f"{name}: {decode_key(decodes, context)}", amount, times, "TB/s")

    def _time_sdpa(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *, causal: bool) -> Times:
        return time_work(
            self._place, lambda: scaled_dot_product_attention(q, k, v, is_causal=causal, enable_gqa=True), graph=False
        )

    def flash_attn(self) -> None:
        """The flash-attn package, where it is installed."""
        from flash_attn import flash_attn_func

        q, k, v = (x.transpose(1, 2).contiguous() for x in self._contiguous(1, 8192, 8192))
        times = time_work(self._place, lambda: flash_attn_func(q, k, v, causal=True), graph=False)
        self._record.rate(f"flash-attn: {extend_key(8192)}", self._operations([(8192, 8192)]) / 1e12, times, "TFLOP/s")

    def _contiguous(self, batch: int, queries: int, context: int) -> list[torch.Tensor]:
        heads, head_dim = self._heads
        shapes = [(heads, queries), (self._config.kv_heads, context), (self._config.kv_heads, context)]
        return [
            torch.randn(batch, count, length, head_dim, device=self._place.device).to(self._place.dtype)
            for count, length in shapes
        ]

    def _bytes_per_token(self, fp8: bool) -> int:
        return 2 * self._config.kv_heads * self._config.head_dim * (1 if fp8 else self._place.dtype.itemsize)

    def _operations(self, chunks: Sequence[tuple[int, int]]) -> float:
        """Floating-point operations of the pairs of tokens that see each other."""
        heads, head_dim = self._heads
        pairs = sum(count * (context - count) + count * (count + 1) // 2 for count, context in chunks)
        return 4.0 * pairs * heads * head_dim

    def _ints(self, numbers: Sequence[object] | range) -> torch.Tensor:
        return torch.tensor(list(numbers), dtype=torch.int32, device=self._place.device)

    def _kv(self, layers: int, pages: int, *, fp8: bool = False) -> KVCache:
        """Random numbers; the memory of the one before is free again."""
        gc.collect()
        kv = KVCache(
            layers=layers,
            pages=pages,
            page_size=PAGE,
            kv_heads=self._config.kv_heads,
            head_dim=self._config.head_dim,
            dtype=FP8 if fp8 else self._place.dtype,
            device=self._place.device,
        )
        for numbers in (kv.keys, kv.values):
            if fp8:
                numbers.random_(0, 0x70)  # codes of finite values
            else:
                numbers.normal_()
        return kv

    def _batch(
        self,
        rows: int,
        tables: torch.Tensor,
        *,
        decodes: DecodeInputs | None = None,
        extends: ExtendInputs | None = None,
    ) -> DeviceBatch:
        """Attention looks at no tokens, positions and slots."""
        unused = torch.zeros(rows, dtype=torch.int32, device=self._place.device)
        return DeviceBatch(
            token_ids=unused,
            positions=unused,
            slots=unused,
            tables=tables,
            decodes=decodes,
            extends=extends,
            logit_rows=None,
        )

    def _work(self, kv: KVCache, rows: int, batch: DeviceBatch) -> Callable[[], object]:
        """All layers once, as a forward pass would."""
        attention = KernelAttention(
            self._config,
            operations=self._place.operations,
            dtype=self._place.dtype,
            device=self._place.device,
            page_size=PAGE,
            max_decodes=rows if batch.decodes is not None else 1,
        )
        layers = kv.keys.shape[0]
        heads, head_dim = self._heads
        q = torch.randn(layers, rows, heads, head_dim, device=self._place.device).to(self._place.dtype)

        def work() -> None:
            attention.begin(batch)
            for layer in range(layers):
                attention.attend(layer, q[layer], kv, self._scale)

        return work
