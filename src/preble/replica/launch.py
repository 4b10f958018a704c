"""From a model name to running replicas: resolve, load, size the KV pages, start."""

from __future__ import annotations

import logging
import os
import re
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from os import PathLike
from pathlib import Path
from typing import ParamSpec, TypeVar

import torch

from preble.engine.batch import Model
from preble.engine.checkpoint import resolve_model
from preble.engine.config import ModelConfig
from preble.engine.engine import Engine
from preble.engine.host_runner import HostRunner
from preble.engine.kv_cache import KVCache
from preble.engine.loading import load_model
from preble.engine.tokenizer import Tokenizer
from preble.errors import DeviceError, InvalidRequest
from preble.replica.base import Listener, Replica
from preble.replica.thread import ThreadReplica

logger = logging.getLogger("preble.replica")

P = ParamSpec("P")
T = TypeVar("T")

GIB = 1 << 30
MOST_KV_MEMORY = 4 * GIB
"""The most KV memory a replica takes by default."""
SHARE_OF_FREE_MEMORY = 0.25
"""What part of the free memory the replicas' KV pages take together by default, once the weights are there."""


@dataclass(slots=True)
class Loaded:
    """Engines that are ready to run, and what they have in common."""

    engines: list[Engine]
    tokenizer: Tokenizer
    config: ModelConfig
    capacity_tokens: int
    """Tokens of KV that one replica holds."""
    torch_threads: int
    """Threads that each replica's operations may use."""


def load(
    model: str | PathLike[str],
    *,
    replicas: int | None,
    devices: Sequence[str] | None,
    dtype: str,
    page_size: int,
    kv_memory: int | str | None,
    max_batched_tokens: int,
    max_running: int,
    local_order: str,
) -> Loaded:
    """Load the model once per device and make an engine per replica. Blocks; seconds for small models.

    Raises:
        CheckpointError: the model cannot be loaded.
        DeviceError: a device does not exist, or its memory holds not even one page.
        InvalidRequest: `kv_memory` or `dtype` means nothing.
    """
    wanted_bytes = None if kv_memory is None else parse_bytes(kv_memory)
    placed = place_replicas(replicas, devices)
    began = time.monotonic()
    with _checkpoint_folder(model) as folder:
        tokenizer = Tokenizer(folder)
        models: dict[torch.device, Model] = {}
        for device in placed:
            if device not in models:
                models[device] = load_model(folder, device=device, dtype=dtype)
    config = models[placed[0]].config
    pages = min(kv_pages(models[device], page_size, wanted_bytes, sharing=placed.count(device)) for device in models)
    engines = [
        Engine(
            HostRunner(models[device], pages=pages, page_size=page_size),
            tokenizer,
            replica=number,
            max_batched_tokens=max_batched_tokens,
            max_running=max_running,
            local_order=local_order,
        )
        for number, device in enumerate(placed)
    ]
    logger.info(
        "loaded %s (%s, %s) in %.1f s: %d replicas with %d tokens of KV each",
        model,
        config.architecture,
        str(models[placed[0]].dtype).removeprefix("torch."),
        time.monotonic() - began,
        len(engines),
        pages * page_size,
    )
    torch_threads = max(len(os.sched_getaffinity(0)) // len(engines), 1)
    return Loaded(engines, tokenizer, config, pages * page_size, torch_threads)


@contextmanager
def _checkpoint_folder(model: str | PathLike[str]) -> Iterator[Path]:
    """The folder to load from; the built-in model's exists only meanwhile."""
    if model != "demo":
        yield resolve_model(os.fspath(model))
        return
    from preble.demo_model import write_demo_model

    with tempfile.TemporaryDirectory(prefix="preble-demo-") as folder:
        write_demo_model(Path(folder))
        yield Path(folder)


def in_a_thread_of_its_own(function: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
    """Call `function` in a thread that ends with it.

    OpenMP keeps a pool of threads for every thread that ever computed. As soon as all pools together outnumber the
    cores, they stop to spin between two operations and sleep instead, which nearly halves the speed of decoding. So
    what loads a model must not leave a pool behind.
    """
    with ThreadPoolExecutor(max_workers=1, thread_name_prefix="preble-load") as executor:
        return executor.submit(function, *args, **kwargs).result()


def launch(loaded: Loaded, listener: Listener) -> list[Replica]:
    """Start a thread for each engine."""
    return [
        ThreadReplica(engine, listener, number=number, torch_threads=loaded.torch_threads)
        for number, engine in enumerate(loaded.engines)
    ]


def place_replicas(replicas: int | None, devices: Sequence[str] | None) -> list[torch.device]:
    """The device of each replica: `devices` in turn, or the CPU."""
    if devices is None and torch.cuda.is_available():
        logger.warning("this version computes on the CPU; the %d visible GPUs stay idle", torch.cuda.device_count())
    parsed = [_device(name) for name in devices or ["cpu"]]
    return [parsed[number % len(parsed)] for number in range(replicas or len(parsed))]


def _device(name: str) -> torch.device:
    try:
        device = torch.device(name)
    except (RuntimeError, TypeError):
        raise DeviceError(f"{name!r} is not a device name; use 'cpu'") from None
    if device.type == "cuda":
        visible = torch.cuda.device_count() if torch.cuda.is_available() else 0
        if (device.index or 0) >= visible:
            raise DeviceError(f"device {name!r} does not exist: {visible or 'no'} CUDA devices are visible here")
    if device.type != "cpu":
        raise DeviceError(f"device {name!r}: this version computes on 'cpu' only")
    return torch.device("cpu")


def kv_pages(model: Model, page_size: int, wanted_bytes: int | None, *, sharing: int) -> int:
    """How many KV pages a replica gets: `wanted_bytes` worth, or its share of the device's free memory."""
    config = model.config
    page_bytes = KVCache.bytes_per_page(
        layers=config.layers,
        page_size=page_size,
        kv_heads=config.kv_heads,
        head_dim=config.head_dim,
        dtype=model.dtype,
    )
    free = _free_memory()
    if wanted_bytes is None:
        budget = min(int(free * SHARE_OF_FREE_MEMORY) // sharing, MOST_KV_MEMORY)
    else:
        budget = wanted_bytes
        if budget * sharing > free:
            raise DeviceError(
                f"kv_memory of {budget / GIB:.2f} GiB for each of {sharing} replicas is more than the "
                f"{free / GIB:.2f} GiB free on {model.device}; lower kv_memory or replicas"
            )
    pages = budget // page_bytes
    if pages < 1:
        raise DeviceError(
            f"kv_memory of {budget} bytes holds not one page of {page_bytes} bytes; raise kv_memory or lower page_size"
        )
    return pages


def _free_memory() -> int:
    try:
        meminfo = Path("/proc/meminfo").read_text()
    except OSError:
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 2
    match = re.search(r"MemAvailable:\s+(\d+) kB", meminfo)
    assert match is not None
    return int(match[1]) * 1024


def parse_bytes(value: int | str) -> int:
    """`"2GiB"`, `"512 MiB"`, `"1.5GB"` or a plain number of bytes."""
    if isinstance(value, int) and not isinstance(value, bool) and value > 0:
        return value
    units = {"": 1, "kib": 1 << 10, "mib": 1 << 20, "gib": GIB, "kb": 10**3, "mb": 10**6, "gb": 10**9}
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([a-z]*)\s*", value.lower()) if isinstance(value, str) else None
    if match is None or match[2] not in units or float(match[1]) == 0:
        raise InvalidRequest(f"kv_memory must be a number of bytes or a string such as '2GiB', not {value!r}")
    return int(float(match[1]) * units[match[2]])
