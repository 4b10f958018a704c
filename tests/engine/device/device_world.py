"""Engines over a device runner on the CPU, by the kernels' references or by the kernels in Triton's interpreter."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from checkpoints import write_checkpoint

from preble.engine.device.build import DeviceLoad, DeviceOptions
from preble.engine.device.runner import DeviceRunner
from preble.engine.engine import Engine
from preble.engine.host_runner import HostRunner
from preble.engine.loading import load_model
from preble.engine.messages import Delta, Submit
from preble.engine.tokenizer import Tokenizer
from preble.kernels.operations import REFERENCE, Operations
from preble.sampling import SamplingParams

CPU = torch.device("cpu")
WIDE = {
    "llama": {"head_dim": 16},
    "mistral": {"head_dim": 16, "sliding_window": 24},
    "qwen2": {"hidden_size": 64},
    "qwen3": {"head_dim": 16},
    "qwen2 half windowed": {
        "hidden_size": 64,
        "use_sliding_window": True,
        "sliding_window": 24,
        "max_window_layers": 1,
    },
}
"""What makes heads of 16 numbers, as narrow as a tensor core takes."""


class DeviceWorld:
    """A tiny checkpoint, its CPU engine for comparison, and device engines over the same weights."""

    def __init__(
        self, folder: Path, family: str = "llama", *, operations: Operations = REFERENCE, **options: Any
    ) -> None:
        write_checkpoint(folder, family.split()[0], **WIDE[family])
        self.tokenizer = Tokenizer(folder)
        self.host_model = load_model(folder, device=CPU, dtype="float32")
        self._folder = folder
        self._operations = operations
        self._options = options

    def load(self, **options: Any) -> DeviceLoad:
        defaults = {"page_size": 16, "kv_bytes": 1 << 22, "max_batched_tokens": 64, "max_running": 8}
        return DeviceLoad(
            self._folder,
            device=CPU,
            replicas=1,
            dtype="float32",
            options=DeviceOptions(**(defaults | self._options | options)),
            operations=self._operations,
        )

    def device(self, *, pages: int = 64, ahead: int = 1, **options: Any) -> Engine:
        load = self.load(**options)
        runner = load.runner(pages)
        runner.ahead = ahead
        made = {"max_batched_tokens": 64, "max_running": 8} | self._options | options
        return Engine(
            runner,
            self.tokenizer,
            max_batched_tokens=made["max_batched_tokens"],
            max_running=made["max_running"],
        )

    def host(self, *, pages: int = 256) -> Engine:
        return Engine(HostRunner(self.host_model, pages=pages, page_size=16), self.tokenizer, max_batched_tokens=64)


def runner_of(engine: Engine) -> DeviceRunner:
    runner = engine._runner
    assert isinstance(runner, DeviceRunner)
    return runner


def submit(request_id: str, prompt: list[int], max_tokens: int, **options: Any) -> Submit:
    options = {"temperature": 0.0, "ignore_eos": True} | options
    return Submit(
        request_id=request_id,
        token_ids=np.array(prompt, np.int32),
        prompt_length=len(prompt),
        max_length=len(prompt) + max_tokens,
        sampling=SamplingParams(max_tokens=max_tokens, **options),
        seed=options.get("seed") or 0,
    )


def finish(
    engine: Engine, requests: list[Submit], between: Callable[[Engine], None] = lambda engine: None
) -> dict[str, list[Delta]]:
    """Run the requests to their ends; all deltas by request. Every page is accounted for after every step."""
    for request in requests:
        engine.submit(request)
    deltas: dict[str, list[Delta]] = {}
    with torch.inference_mode():
        while engine.has_work:
            for delta in engine.step().deltas:
                deltas.setdefault(delta.request_id, []).append(delta)
            engine.scheduler.check()
            between(engine)
    stats = engine.stats()
    assert (stats.running, stats.waiting, stats.pages_in_use) == (0, 0, 0)
    return deltas


def tokens(deltas: list[Delta]) -> list[int]:
    return [token for delta in deltas for token in delta.token_ids]


def prompts(count: int, seed: int = 0, *, stem: int = 70, tail: int = 20) -> list[list[int]]:
    """Ragged prompts, most of which share a stem with others."""
    rng = random.Random(seed)
    stems = [[rng.randrange(4, 260) for _ in range(stem)] for _ in range(2)]
    return [
        rng.choice(stems)[: rng.choice([0, 17, stem])] + [rng.randrange(4, 260) for _ in range(rng.randint(1, tail))]
        for _ in range(count)
    ]
