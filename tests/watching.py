"""What tests of a running cluster share: its answers undisturbed, waiting, a replica's health, faults in its steps."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import anyio
import pytest

from preble import Cluster, ReplicaHealth
from preble.engine.engine import Engine

_UNDISTURBED: dict[tuple[Path, str, str], tuple[int, ...]] = {}
"""Model, prompt and options -> tokens."""


async def undisturbed(model: Path, prompts: list[str], **options: Any) -> list[tuple[int, ...]]:
    """The tokens that each prompt gives where nothing happens. Found out once in a process for the same options."""
    keys = {prompt: (model, prompt, repr(sorted(options.items()))) for prompt in prompts}
    if unknown := [prompt for prompt, key in keys.items() if key not in _UNDISTURBED]:
        async with Cluster(model, replicas=1, page_size=16, kv_memory="1MiB", dtype="float32") as cluster:
            outputs = await cluster.generate_many(unknown, **options)
        _UNDISTURBED.update((keys[prompt], one.token_ids) for prompt, one in zip(unknown, outputs, strict=True))
    return [_UNDISTURBED[keys[prompt]] for prompt in prompts]


async def until(condition: Callable[[], bool]) -> None:
    """Needs no time limit: a hang is the failure."""
    while not condition():  # noqa: ASYNC110 - no event is set when this becomes true
        await anyio.sleep(0.001)


def health(cluster: Cluster, replica: int = 0) -> ReplicaHealth:
    """Of one replica, now."""
    (found,) = (one for one in cluster.health().replicas if one.replica == replica)
    return found


@contextmanager
def faulty_steps(monkeypatch: pytest.MonkeyPatch, fault: Callable[[Engine], object]) -> Iterator[None]:
    """Every engine of this process calls `fault` before each of its steps."""
    original = Engine.step

    def step(engine: Engine) -> Any:
        fault(engine)
        return original(engine)

    with monkeypatch.context() as patch:
        patch.setattr(Engine, "step", step)
        yield


@contextmanager
def hanging_step(monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[threading.Event, threading.Event]]:
    """Replica 0 stands still in the middle of its work, once: the first event says that it does, the second lets it go
    on."""
    hanging, go_on = threading.Event(), threading.Event()

    def fault(engine: Engine) -> None:
        if engine._replica == 0 and engine.generated_tokens >= 20 and not hanging.is_set():
            hanging.set()
            go_on.wait()

    with faulty_steps(monkeypatch, fault):
        yield hanging, go_on
