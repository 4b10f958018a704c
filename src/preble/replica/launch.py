"""Starts replicas: each in a thread of this process, or in a process of its own."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Literal, ParamSpec, TypeVar

import torch

from preble.engine.engine import Engine
from preble.engine.messages import Launch
from preble.engine.options import EngineOptions
from preble.engine.source import TOKENS_PER_STEP, EngineSource
from preble.engine.tokenizer import Tokenizer
from preble.errors import InvalidRequest
from preble.replica.base import Listener, Replica
from preble.replica.thread import ThreadReplica

P = ParamSpec("P")
T = TypeVar("T")

Workers = Literal["auto", "thread", "process"]


class Launcher:
    """What all replicas of a cluster have in common, and how one is started. Blocks while it is made, for seconds.

    Args:
        model: a checkpoint folder, a hub id or `"demo"`.
        devices: of the first replicas, in their order.
        workers: `"auto"` takes processes where every replica has a GPU to itself, threads otherwise.
        options: what the user chose.

    Raises:
        CheckpointError: there is no such model, or its config or tokenizer cannot be read.
        InvalidRequest: an option means nothing.
    """

    def __init__(self, model: str, devices: Sequence[torch.device], workers: Workers, options: EngineOptions) -> None:
        shared = any(device.type == "cuda" and devices.count(device) > 1 for device in devices)
        if workers == "process" and shared and options.kv_memory is None:
            # Each would size its pages by what is free while the others still load.
            raise InvalidRequest("replicas that share a GPU in processes of their own need kv_memory=…; or use threads")
        alone = not shared and all(device.type == "cuda" for device in devices)
        self.in_processes = workers == "process" or (workers == "auto" and alone)
        tokens = options.max_batched_tokens or min(TOKENS_PER_STEP[device.type] for device in devices)
        self.options = replace(options, max_batched_tokens=tokens)
        self._devices = list(devices)
        self._torch_threads = max(len(os.sched_getaffinity(0)) // len(devices), 1)
        self._source = in_a_thread_of_its_own(EngineSource, model, self.options)
        assert isinstance(self._source.text, Tokenizer)
        self.tokenizer = self._source.text
        self._text = self.tokenizer.text_state() if self.in_processes else None
        self.config = self._source.config

    def start(self, number: int, device: torch.device, pages: int | None, listener: Listener) -> Replica:
        """Start replica `number`; returns at once.

        Args:
            number: which one.
            device: where it shall run.
            pages: how many KV pages it gets, where an earlier life of it settled that.
            listener: is told when it is ready, and everything that follows.
        """
        sharing = max(self._devices.count(device), 1)
        if self.in_processes:
            from preble.replica.process import ProcessReplica

            launch = Launch(
                # Looked up once, so that neither the working directory nor the hub matters to a restart.
                model=str(self._source.folder),
                replica=number,
                device=str(device),
                sharing=sharing,
                torch_threads=self._torch_threads,
                options=self.options,
                pages=pages,
                text=self._text,
                log_level=logging.getLogger("preble").getEffectiveLevel(),
            )
            return ProcessReplica(launch, listener)

        def engine() -> Engine:
            return in_a_thread_of_its_own(self._source.engine, number, str(device), sharing=sharing, pages=pages)

        return ThreadReplica(number, engine, listener, torch_threads=self._torch_threads)


def in_a_thread_of_its_own(function: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
    """Call `function` in a thread that ends with it.

    OpenMP keeps a pool of threads for every thread that ever computed. As soon as all pools together outnumber the
    cores, they stop to spin between two operations and sleep instead, which nearly halves the speed of decoding. So
    what loads a model must not leave a pool behind.
    """
    with ThreadPoolExecutor(max_workers=1, thread_name_prefix="preble-load") as executor:
        return executor.submit(function, *args, **kwargs).result()
