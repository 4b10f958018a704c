"""From a checkpoint to runners on a CUDA device: check the device, load, rehearse, size the KV pages, capture."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

from preble.engine.config import ModelConfig
from preble.engine.device.attention import Attention
from preble.engine.device.batch import DeviceModel
from preble.engine.device.kernel_attention import KernelAttention
from preble.engine.device.memory import GIB, PER_GRAPH, DeviceMemory, free_and_total
from preble.engine.device.queue import Queue, make_queue
from preble.engine.device.rehearsal import calibrate, extend_batch, warm_up
from preble.engine.device.runner import DeviceRunner
from preble.engine.kv_cache import FP8, KVCache
from preble.engine.loading import load_device_model
from preble.errors import DeviceError, InvalidRequest, UnsupportedModel
from preble.kernels.architecture import Architecture, architecture_of
from preble.kernels.operations import REFERENCE, TRITON, Operations
from preble.kernels.tiles import extend_tile

logger = logging.getLogger("preble.engine")

ATTENTIONS = ("auto", "triton", "flash-attn", "torch")
KV_DTYPES = ("auto", "fp8")
SMALLEST_HEAD, LARGEST_HEAD = 16, 256
"""Numbers in a head: what tensor cores take at least, and what the kernels' tiles hold at most."""
SMALLEST_PAGE, LARGEST_PAGE = 16, 256


@dataclass(frozen=True, slots=True)
class DeviceOptions:
    """What a user may choose about a replica on a device; see `Cluster`."""

    page_size: int
    kv_bytes: int | None
    max_batched_tokens: int
    max_running: int
    attention: str = "auto"
    kv_dtype: str = "auto"


class DeviceLoad:
    """A model on a device, from which runners are made.

    Args:
        folder: the checkpoint.
        device: a CUDA device; or the CPU, where the kernels run in Triton's interpreter.
        replicas: runners that will share it.
        dtype: as for `resolve_dtype`.
        options: what the user chose.
        operations: which kernels.

    Raises:
        DeviceError: the GPU is too old, too small, or lacks what was asked for.
        CheckpointError: the model cannot be loaded.
        InvalidRequest: an option is not one.
    """

    def __init__(
        self,
        folder: Path,
        *,
        device: torch.device,
        replicas: int,
        dtype: str,
        options: DeviceOptions,
        operations: Operations = TRITON,
    ) -> None:
        self._options = options
        self._operations = operations
        self._scales: tuple[torch.Tensor, torch.Tensor] | None = None
        config = ModelConfig.from_folder(folder)
        architecture_of(device)
        check_options(config, options)
        queue = make_queue(device)
        try:
            with torch.inference_mode(), queue.use():
                self.model = load_device_model(folder, config, operations, device=device, dtype=dtype)
                self._prepare(replicas, queue)
                queue.mark().wait()
        except torch.OutOfMemoryError as error:
            raise DeviceError(
                f"{device} with {free_and_total(device)[1] / GIB:.1f} GiB is too small for {folder} and a step of "
                f"{options.max_batched_tokens} tokens: {error}. Use a GPU with more memory, a smaller model, or "
                "a lower max_batched_tokens"
            ) from error

    def _prepare(self, replicas: int, queue: Queue) -> None:
        model, config, options = self.model, self.model.config, self._options
        check_group(config, model.dtype, architecture_of(model.device))
        self._make_attention = attention_factory(model, options, self._operations)
        needs = self._rehearse(queue)
        free, total = free_and_total(model.device)
        memory = DeviceMemory(str(model.device), total, free, **needs)
        page_bytes = KVCache.bytes_per_page(
            layers=config.layers,
            page_size=options.page_size,
            kv_heads=config.kv_heads,
            head_dim=config.head_dim,
            dtype=self._kv_dtype,
        )
        kv_bytes = memory.kv_bytes(replicas=replicas, wanted=options.kv_bytes)
        self.pages = kv_bytes // page_bytes
        """That each replica can have."""
        if self.pages < 1:
            raise DeviceError(
                f"{kv_bytes} bytes of KV memory on {model.device} hold not one page of {page_bytes} bytes; raise "
                "kv_memory, lower page_size, or use kv_dtype='fp8'"
            )
        logger.info("%s: %s, %d pages for each replica", model.device, memory, self.pages)

    def _rehearse(self, queue: Queue) -> dict[str, int]:
        """Run steps on nothing, which also compiles the kernels; the bytes that each part of a runner takes."""
        model, options = self.model, self._options
        runners: list[DeviceRunner] = []
        fixed = queue.peak_bytes(lambda: runners.append(self._runner(1)))
        kv, attention = self._kv(1, dtype=self._kv_dtype), self._make_attention()
        for part in (kv.keys, kv.values):
            part.zero_()  # what lies in new memory may be NaN
        decodes = min(1, options.max_batched_tokens - 1)
        batch = extend_batch(
            model.config,
            options.max_batched_tokens - decodes,
            decodes=decodes,
            logits=options.max_running,
            stored=False,
            device=model.device,
            dtype=model.dtype,
        )
        activations = queue.peak_bytes(lambda: model.forward(batch, kv, attention))
        decoding = queue.peak_bytes(runners[0].rehearse_decode)
        if options.kv_dtype == "fp8":
            self._scales = calibrate(model, attention, options.page_size)
        graphs = runners[0].graphs
        return {
            "activations": max(activations, decoding),
            "graphs": graphs * PER_GRAPH + decoding if graphs else 0,
            "fixed": fixed,
        }

    def runner(self, pages: int) -> DeviceRunner:
        """A runner with `pages` KV pages, its CUDA graphs captured."""
        try:
            with torch.inference_mode(), make_queue(self.model.device).use():
                runner = self._runner(pages)
                runner.capture()
                warm_up(runner)
        except torch.OutOfMemoryError as error:
            raise DeviceError(
                f"{self.model.device} has less memory left than was found before ({error}); does another program use "
                "it? Set kv_memory to what may be taken"
            ) from error
        return runner

    @property
    def _kv_dtype(self) -> torch.dtype:
        return FP8 if self._options.kv_dtype == "fp8" else self.model.dtype

    def _kv(self, pages: int, *, dtype: torch.dtype) -> KVCache:
        config = self.model.config
        return KVCache(
            layers=config.layers,
            pages=pages,
            page_size=self._options.page_size,
            kv_heads=config.kv_heads,
            head_dim=config.head_dim,
            dtype=dtype,
            device=self.model.device,
        )

    def _runner(self, pages: int) -> DeviceRunner:
        kv = self._kv(pages, dtype=self._kv_dtype)
        if self._scales is not None:
            kv.key_scales, kv.value_scales = self._scales
        return DeviceRunner(
            self.model,
            operations=self._operations,
            attention=self._make_attention(),
            kv=kv,
            max_running=self._options.max_running,
            max_batched_tokens=self._options.max_batched_tokens,
        )


def check_options(config: ModelConfig, options: DeviceOptions) -> None:
    """Raise `InvalidRequest` or `UnsupportedModel` for what the kernels do not cover."""
    if options.attention not in ATTENTIONS:
        raise InvalidRequest(f"attention must be one of {', '.join(ATTENTIONS)}, not {options.attention!r}")
    if options.kv_dtype not in KV_DTYPES:
        raise InvalidRequest(f"kv_dtype must be one of {', '.join(KV_DTYPES)}, not {options.kv_dtype!r}")
    size = options.page_size
    if size & (size - 1) or not SMALLEST_PAGE <= size <= LARGEST_PAGE:
        raise InvalidRequest(
            f"page_size must be a power of two from {SMALLEST_PAGE} to {LARGEST_PAGE} on a GPU, not {size}"
        )
    if config.head_dim % 8 or not SMALLEST_HEAD <= config.head_dim <= LARGEST_HEAD:
        raise UnsupportedModel(
            f"{config.architecture} has heads of {config.head_dim} numbers; the GPU kernels cover multiples of 8 from "
            f"{SMALLEST_HEAD} to {LARGEST_HEAD}. devices=['cpu'] runs it on the CPU"
        )


def check_group(config: ModelConfig, dtype: torch.dtype, architecture: Architecture) -> None:
    """Raise `UnsupportedModel` where more query heads share a KV head than a tile has rows."""
    group = config.query_heads // config.kv_heads
    most = extend_tile(architecture, config.head_dim, dtype.itemsize).rows
    if group > most:
        raise UnsupportedModel(
            f"{config.architecture} has {group} query heads for each KV head; in {str(dtype).removeprefix('torch.')} "
            f"the GPU kernels of {architecture.name} cover up to {most}. devices=['cpu'] runs it on the CPU"
        )


def attention_factory(model: DeviceModel, options: DeviceOptions, operations: Operations) -> Callable[[], Attention]:
    """What makes the attention backend that `options` name, one for each runner.

    Raises `DeviceError` where it cannot be had.
    """
    if options.attention == "flash-attn":
        from preble.engine.device.flash_attention import FlashAttention, flash_attention_problem

        kv_dtype = FP8 if options.kv_dtype == "fp8" else model.dtype
        problem = flash_attention_problem(
            model.config, dtype=model.dtype, kv_dtype=kv_dtype, page_size=options.page_size, device=model.device
        )
        if problem is not None:
            raise DeviceError(f"attention='flash-attn' is not possible: {problem}; attention='triton' needs nothing")
        return lambda: FlashAttention(model.config, device=model.device, page_size=options.page_size)
    return lambda: KernelAttention(
        model.config,
        operations=REFERENCE if options.attention == "torch" else operations,
        dtype=model.dtype,
        device=model.device,
        page_size=options.page_size,
        max_decodes=min(options.max_running, options.max_batched_tokens),
    )
