"""What the replicas were doing, looked at now and then."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from preble.sim.replica import SimulatedReplica


class Samples:
    """A row per look."""

    def __init__(self, replicas: int) -> None:
        self._replicas = replicas
        self._times: list[float] = []
        self._rows: list[list[tuple[int, int, float, int, int]]] = []

    def take(self, now: float, replicas: Sequence[SimulatedReplica]) -> None:
        """Look at all replicas."""
        self._times.append(now)
        self._rows.append(
            [
                (
                    len(one.local.running),
                    len(one.local.waiting),
                    one.busy_seconds,
                    one.local.prompt_tokens,
                    one.local.cached_tokens,
                )
                for one in replicas
            ]
        )

    @property
    def times(self) -> NDArray[np.float64]:
        """[samples] seconds."""
        return np.array(self._times)

    def column(self, name: str) -> NDArray[np.float64]:
        """[samples, replicas]: `running` and `waiting` requests, and `busy_seconds`, `prompt_tokens`, `cached_tokens` since
        the start."""
        at = ("running", "waiting", "busy_seconds", "prompt_tokens", "cached_tokens").index(name)
        table = np.array(self._rows, np.float64).reshape(len(self._rows), self._replicas, 5)
        return table[:, :, at]
