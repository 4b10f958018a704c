"""What tests of a running cluster share: waiting for a condition, a replica's health, faults in its steps."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import anyio
import pytest

from preble import Cluster, ReplicaHealth
from preble.engine.engine import Engine


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
