"""What the replicas were doing, looked at now and then."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from preble.sim.replica import SimulatedReplica

MOST = 400
"""Looks kept. When there are more, every second one is dropped, and the time from one to the next doubles."""


class Look(NamedTuple):
    """One replica at one time. What is counted is counted since the start."""

    running: int
    waiting: int
    busy_seconds: float
    prompt_tokens: int
    """Of the requests admitted."""
    cached_tokens: int
    """… found in its cache."""


class Samples:
    """Looks at all replicas, evenly spread over a run however long that takes.

    Args:
        replicas: how many there are.
        every: seconds from one look to the next at first.
    """

    def __init__(self, replicas: int, every: float) -> None:
        self.every = every
        self._replicas = replicas
        self._times: list[float] = []
        self._looks: list[NDArray[np.float64]] = []

    def take(self, now: float, replicas: Sequence[SimulatedReplica]) -> None:
        """Look at all replicas."""
        self._times.append(now)
        looks = [
            Look(
                len(one.local.running),
                one.waiting,
                one.busy_seconds,
                one.local.prompt_tokens,
                one.local.cached_tokens,
            )
            for one in replicas
        ]
        self._looks.append(np.array(looks, np.float64))
        if len(self._times) > MOST:
            del self._times[::2], self._looks[::2]
            self.every *= 2

    @property
    def times(self) -> NDArray[np.float64]:
        """float64 [looks]: seconds since the start, rising."""
        return np.array(self._times)

    def column(self, name: str) -> NDArray[np.float64]:
        """float64 [looks, replicas]: a field of `Look`."""
        table = np.array(self._looks).reshape(len(self._looks), self._replicas, len(Look._fields))
        return table[:, :, Look._fields.index(name)]
