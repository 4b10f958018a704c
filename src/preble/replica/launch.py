"""From a model name to running replicas: resolve, load, size the KV pages, start."""

from __future__ import annotations

import logging
import os
import re
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, ParamSpec, Protocol, TypeVar

import torch

from preble.engine.checkpoint import resolve_model
from preble.engine.config import ModelConfig
from preble.engine.engine import Engine
from preble.engine.host_load import HostLoad
from preble.engine.runner import Runner
from preble.engine.tokenizer import Tokenizer
from preble.errors import DeviceError, InvalidRequest
from preble.replica.base import Listener, Replica
from preble.replica.devices import place_replicas
from preble.replica.options import LoadOptions
from preble.replica.thread import ThreadReplica

if TYPE_CHECKING:
    from preble.engine.batch import Model
    from preble.engine.device.batch import DeviceModel

logger = logging.getLogger("preble.replica")

P = ParamSpec("P")
T = TypeVar("T")

TOKENS_PER_STEP = {"cpu": 1024, "cuda": 8192}
"""`max_batched_tokens` by default: enough that a step's fixed costs do not count, and no more, since others wait."""


@dataclass(slots=True)
class Loaded:
    """Engines that are ready to run, and what they have in common."""

    engines: list[Engine]
    tokenizer: Tokenizer
    config: ModelConfig
    capacity_tokens: int
    """Tokens of KV that one replica holds."""
    max_batched_tokens: int
    """Tokens of a step at most."""
    torch_threads: int
    """Threads that each replica's operations may use."""


class ModelLoad(Protocol):
    """A model on a device, from which runners are made."""

    @property
    def model(self) -> Model | DeviceModel: ...

    pages: int
    """KV pages that each replica can have."""

    def runner(self, pages: int) -> Runner:
        """A runner with `pages` KV pages."""
        ...


def load(model: str | PathLike[str], options: LoadOptions) -> Loaded:
    """Load the model once per device and make an engine per replica. Blocks; seconds for small models.

    Raises:
        CheckpointError: the model cannot be loaded.
        DeviceError: a device does not exist, cannot do what is asked of it, or its memory holds not even one page.
        InvalidRequest: an option means nothing.
    """
    placed = place_replicas(options.replicas, options.devices)
    began = time.monotonic()
    tokens = options.max_batched_tokens or min(TOKENS_PER_STEP[device.type] for device in placed)
    with _checkpoint_folder(model) as folder:
        tokenizer = Tokenizer(folder)
        loads = {
            device: _load_on(device, folder, placed.count(device), tokens, options) for device in dict.fromkeys(placed)
        }
        pages = min(one.pages for one in loads.values())
        engines = [
            Engine(
                loads[device].runner(pages),
                tokenizer,
                replica=number,
                max_batched_tokens=tokens,
                max_running=options.max_running,
                local_order=options.local_order,
            )
            for number, device in enumerate(placed)
        ]
    first = loads[placed[0]].model
    logger.info(
        "loaded %s (%s, %s) in %.1f s: %d replicas with %d tokens of KV each",
        model,
        first.config.architecture,
        str(first.dtype).removeprefix("torch."),
        time.monotonic() - began,
        len(engines),
        pages * options.page_size,
    )
    torch_threads = max(len(os.sched_getaffinity(0)) // len(engines), 1)
    return Loaded(engines, tokenizer, first.config, pages * options.page_size, tokens, torch_threads)


def _load_on(
    device: torch.device, folder: Path, replicas: int, max_batched_tokens: int, options: LoadOptions
) -> ModelLoad:
    kv_bytes = None if options.kv_memory is None else parse_bytes(options.kv_memory)
    if device.type == "cpu" and options.attention != "triton":
        if options.attention not in ("auto", "torch"):
            raise InvalidRequest(f"attention must be 'auto' or 'torch' on the CPU, not {options.attention!r}")
        if options.kv_dtype != "auto":
            raise InvalidRequest(f"kv_dtype must be 'auto' on the CPU, not {options.kv_dtype!r}")
        return HostLoad(folder, replicas=replicas, dtype=options.dtype, page_size=options.page_size, kv_bytes=kv_bytes)
    if device.type == "cpu" and os.environ.get("TRITON_INTERPRET") != "1":
        raise DeviceError(
            "attention='triton' on the CPU is for debugging, in Triton's interpreter: set TRITON_INTERPRET=1 before "
            "Python starts. Use attention='auto' to compute on the CPU"
        )
    from preble.engine.device.build import DeviceLoad, DeviceOptions

    return DeviceLoad(
        folder,
        device=device,
        replicas=replicas,
        dtype=options.dtype,
        options=DeviceOptions(
            page_size=options.page_size,
            kv_bytes=kv_bytes,
            max_batched_tokens=max_batched_tokens,
            max_running=options.max_running,
            attention=options.attention,
            kv_dtype=options.kv_dtype,
        ),
    )


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


def parse_bytes(value: int | str) -> int:
    """`"2GiB"`, `"512 MiB"`, `"1.5GB"` or a plain number of bytes."""
    if isinstance(value, int) and not isinstance(value, bool) and value > 0:
        return value
    units = {"": 1, "kib": 1 << 10, "mib": 1 << 20, "gib": 1 << 30, "kb": 10**3, "mb": 10**6, "gb": 10**9}
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([a-z]*)\s*", value.lower()) if isinstance(value, str) else None
    if match is None or match[2] not in units or float(match[1]) == 0:
        raise InvalidRequest(f"kv_memory must be a number of bytes or a string such as '2GiB', not {value!r}")
    return int(float(match[1]) * units[match[2]])
