"""Attention by the FlashAttention packages, where they are installed and cover what is asked for."""

from __future__ import annotations

import torch

from preble.engine.config import ModelConfig
from preble.engine.device.batch import DeviceBatch
from preble.engine.device.flash_library import FlashChunks, FlashOptions, find_library
from preble.engine.kv_cache import FP8, KVCache
from preble.errors import DeviceError

LARGEST_HEAD = 256


class FlashAttention:
    """An `Attention` of one call for the decodes and one for the prefill chunks.

    Args:
        config: of the model.
        device: where everything lies.
        page_size: tokens in a page.

    Raises `DeviceError` where no package is usable; `flash_attention_problem` knows everything that may be wrong.
    """

    name = "flash-attn"
    shares_prefixes = False

    def __init__(self, config: ModelConfig, *, device: torch.device, page_size: int) -> None:
        library, problem = find_library(_capability(device), page_size)
        if library is None:
            raise DeviceError(problem)
        self.capturable = library.capturable
        self._library = library
        self._windows = config.layer_windows
        self._page_size = page_size
        self._batch: DeviceBatch | None = None
        self._decode_tables: torch.Tensor | None = None
        self._chunks: FlashChunks | None = None

    def begin(self, batch: DeviceBatch) -> None:
        self._batch = batch
        self._decode_tables = self._chunks = None
        if batch.decodes is not None:
            self._decode_tables = batch.tables.index_select(0, batch.decodes.rows)
        if batch.extends is not None:
            extends = batch.extends
            pages = -(-extends.longest_context // self._page_size)
            self._chunks = FlashChunks(
                tables=batch.tables[:, :pages].index_select(0, extends.rows),
                context_lengths=extends.context_lengths,
                context_starts=torch.nn.functional.pad(extends.context_lengths.cumsum(0, dtype=torch.int32), (1, 0)),
                query_starts=extends.query_starts,
                longest=extends.longest,
                longest_context=extends.longest_context,
            )

    def attend(self, layer: int, q: torch.Tensor, kv: KVCache, scale: float) -> torch.Tensor:
        batch = self._batch
        assert batch is not None
        keys, values = (part[layer].view(-1, self._page_size, *part.shape[2:]) for part in (kv.keys, kv.values))
        options = FlashOptions(scale, self._windows[layer])
        answers = []
        count = 0
        if batch.decodes is not None:
            assert self._decode_tables is not None
            count = len(batch.decodes.rows)
            lengths = batch.decodes.context_lengths
            answers.append(self._library.decode(q[:count], keys, values, self._decode_tables, lengths, options))
        if self._chunks is not None:
            answers.append(self._library.extend(q[count:], keys, values, self._chunks, options))
        return answers[0].contiguous() if len(answers) == 1 else torch.cat(answers)


def flash_attention_problem(
    config: ModelConfig, *, dtype: torch.dtype, kv_dtype: torch.dtype, page_size: int, device: torch.device
) -> str | None:
    """Why `FlashAttention` cannot be used, and what would help, without a full stop; None where it can.

    Args:
        config: of the model.
        dtype: of the queries.
        kv_dtype: of the KV cache.
        page_size: tokens in a page.
        device: where everything would lie.
    """
    if device.type != "cuda":
        return f"it runs on CUDA devices only, not on {device}"
    capability = _capability(device)
    if capability < (8, 0):
        return f"{device} has compute capability {capability[0]}.{capability[1]}, and it needs 8.0 (Ampere) or newer"
    if dtype not in (torch.float16, torch.bfloat16):
        return f"it computes in float16 and bfloat16, not in {str(dtype).removeprefix('torch.')} (set dtype)"
    if kv_dtype == FP8:
        return "it reads an fp8 KV cache with queries in fp8 only (use kv_dtype='auto')"
    if config.head_dim > LARGEST_HEAD or config.head_dim % 8:
        return f"its heads are multiples of 8 up to {LARGEST_HEAD}, and {config.architecture} has {config.head_dim}"
    library, problem = find_library(capability, page_size)
    return problem if library is None else None


def _capability(device: torch.device) -> tuple[int, int]:
    return torch.cuda.get_device_capability(device)
