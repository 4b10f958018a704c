"""From a model's name to engines: resolve, load once per device, size the KV pages."""

from __future__ import annotations

import logging
import os
import re
import threading
import time
from typing import TYPE_CHECKING, Protocol

import torch

from preble.demo import CHECKPOINT
from preble.engine.checkpoint import resolve_model
from preble.engine.config import ModelConfig
from preble.engine.engine import Engine
from preble.engine.host_load import HostLoad
from preble.engine.options import EngineOptions
from preble.engine.runner import Runner
from preble.engine.token_text import RestoredTokenText, TokenText, TokenTextState
from preble.engine.tokenizer import Tokenizer
from preble.errors import DeviceError, InvalidRequest, shown

if TYPE_CHECKING:
    from preble.engine.batch import Model
    from preble.engine.device.batch import DeviceModel

logger = logging.getLogger("preble.engine")

TOKENS_PER_STEP = {"cpu": 1024, "cuda": 8192}
"""`max_batched_tokens` by default: enough that a step's fixed costs do not count, and no more, since others wait."""


class ModelLoad(Protocol):
    """A model on a device, from which runners are made."""

    @property
    def model(self) -> Model | DeviceModel: ...

    pages: int
    """KV pages that each replica can have."""

    def runner(self, pages: int) -> Runner:
        """A runner with `pages` KV pages."""
        ...


class EngineSource:
    """A checkpoint from which engines are made. Weights are loaded with the first engine on a device and shared by
    those that follow.

    Args:
        model: a folder, a hub id or `"demo"`.
        options: what the user chose.
        text: what engines decode with; by default the checkpoint's tokenizer.

    Raises:
        CheckpointError: there is no such model, or its config or tokenizer cannot be read.
        InvalidRequest: an option means nothing.
    """

    def __init__(self, model: str, options: EngineOptions, text: TokenTextState | None = None) -> None:
        self._model = model
        self._options = options
        self._kv_bytes = None if options.kv_memory is None else parse_bytes(options.kv_memory)
        self._loads: dict[torch.device, ModelLoad] = {}
        self._lock = threading.Lock()
        self.folder = (CHECKPOINT if model == "demo" else resolve_model(model)).absolute()
        """Where the checkpoint lies."""
        self.config = ModelConfig.from_folder(self.folder)
        self.text: TokenText = Tokenizer(self.folder) if text is None else RestoredTokenText(text)

    def engine(self, number: int, device: str, *, sharing: int, pages: int | None = None) -> Engine:
        """An engine for replica `number`. Blocks, for as long as loading takes; may be called from any thread.

        Args:
            number: the replica's number, for its events.
            device: where it runs: `"cpu"` or `"cuda:0"`.
            sharing: replicas that share the device's memory.
            pages: how many KV pages it gets; by default its share of what fits.

        Raises:
            CheckpointError: the weights cannot be loaded.
            DeviceError: the device cannot do what is asked of it, or its memory holds not even one page.
            InvalidRequest: an option means nothing.
        """
        where = torch.device(device)
        tokens = self._options.max_batched_tokens or TOKENS_PER_STEP[where.type]
        with self._lock:
            load = self._loads.get(where)
            if load is None:
                load = self._loads[where] = self._load(where, sharing, tokens)
        return Engine(
            load.runner(load.pages if pages is None else pages),
            self.text,
            replica=number,
            max_batched_tokens=tokens,
            max_running=self._options.max_running,
            local_order=self._options.local_order,
        )

    def _load(self, device: torch.device, replicas: int, max_batched_tokens: int) -> ModelLoad:
        began = time.monotonic()
        load = self._load_on(device, replicas, max_batched_tokens)
        logger.info(
            "loaded %s (%s, %s) on %s in %.1f s: %d tokens of KV for each of %d replicas",
            self._model,
            self.config.architecture,
            str(load.model.dtype).removeprefix("torch."),
            device,
            time.monotonic() - began,
            load.pages * self._options.page_size,
            replicas,
        )
        return load

    def _load_on(self, device: torch.device, replicas: int, max_batched_tokens: int) -> ModelLoad:
        options = self._options
        if device.type == "cpu" and options.attention != "triton":
            if options.attention not in ("auto", "torch"):
                raise InvalidRequest(f"attention must be 'auto' or 'torch' on the CPU, not {options.attention!r}")
            if options.kv_dtype != "auto":
                raise InvalidRequest(f"kv_dtype must be 'auto' on the CPU, not {options.kv_dtype!r}")
            return HostLoad(
                self.folder,
                replicas=replicas,
                dtype=options.dtype,
                page_size=options.page_size,
                kv_bytes=self._kv_bytes,
            )
        if device.type == "cpu" and os.environ.get("TRITON_INTERPRET") != "1":
            raise DeviceError(
                "attention='triton' on the CPU is for debugging, in Triton's interpreter: set TRITON_INTERPRET=1 "
                "before Python starts. Use attention='auto' to compute on the CPU"
            )
        from preble.engine.device.build import DeviceLoad, DeviceOptions

        return DeviceLoad(
            self.folder,
            device=device,
            replicas=replicas,
            dtype=options.dtype,
            options=DeviceOptions(
                page_size=options.page_size,
                kv_bytes=self._kv_bytes,
                max_batched_tokens=max_batched_tokens,
                max_running=options.max_running,
                attention=options.attention,
                kv_dtype=options.kv_dtype,
            ),
        )


def parse_bytes(value: int | str) -> int:
    """`"2GiB"`, `"512 MiB"`, `"1.5GB"` or a plain number of bytes."""
    if isinstance(value, int) and not isinstance(value, bool) and value > 0:
        return value
    units = {"": 1, "kib": 1 << 10, "mib": 1 << 20, "gib": 1 << 30, "kb": 10**3, "mb": 10**6, "gb": 10**9}
    units |= {"tib": 1 << 40, "tb": 10**12}
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([a-z]*)\s*", value.lower()) if isinstance(value, str) else None
    if match is None or match[2] not in units or float(match[1]) == 0:
        raise InvalidRequest(
            f"kv_memory must be a number of bytes, or a string such as '2GiB' or '500MB', not {shown(value)}"
        )
    return int(float(match[1]) * units[match[2]])
