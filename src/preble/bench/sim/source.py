"""Where the requests of a setting come from: a trace file, or a workload made to order."""

from __future__ import annotations

import hashlib
import math
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path

from preble.errors import InvalidRequest
from preble.sim.trace import Trace
from preble.sim.traces import read_trace
from preble.sim.workloads import WORKLOADS, make_workload

AT_ONCE = math.inf
"""The rate of requests that all arrive at the same time."""
GPUS = 2
"""Workloads tell how many prefixes, requests and requests per second are fair for so many GPUs, or pairs of them."""


@dataclass(frozen=True, slots=True)
class Source:
    """Requests whose contents are fixed; when they arrive is up to the setting."""

    name: str
    """How it is called in reports."""
    file: str | None
    """Of a trace; `None` makes the workload called `name`."""
    requests: int | None
    """The first so many. `None`: all of a file; as many of a workload as are fair for the replicas."""

    @classmethod
    def of_file(cls, file: Path, requests: int | None) -> Source:
        """The requests of a trace file, called like the file."""
        return cls(file.name.split(".")[0], str(file), requests)

    def trace(self, rate: float, replicas: int, seed: int) -> Trace:
        """The requests at `rate` per second on average, or `AT_ONCE`. `seed` is for what workloads leave to chance.

        Raises:
            InvalidRequest: the file is no trace, all its requests arrive at once, or there is no such workload.
        """
        if self.file is None:
            return self._made(rate, replicas, seed)
        trace = _read(self.file)
        trace = trace if self.requests is None else trace.first(self.requests)
        if rate == AT_ONCE:
            return replace(trace, requests=tuple(replace(one, arrival=0.0) for one in trace.requests))
        if not trace.rate:
            raise InvalidRequest(f"all requests of {self.file} arrive at once: they have no rate that could be changed")
        return trace.scaled(rate / trace.rate)

    def fingerprint(self) -> str:
        """Changes when the file does."""
        return "" if self.file is None else _fingerprint(self.file)

    def _made(self, rate: float, replicas: int, seed: int) -> Trace:
        if self.name not in WORKLOADS:
            raise InvalidRequest(f"no workload {self.name!r}; there are {', '.join(WORKLOADS)}")
        workload = WORKLOADS[self.name]
        share = replicas / GPUS
        return make_workload(
            self.name,
            requests=self.requests or round(workload.requests * share),
            rate=workload.rate * share if rate == AT_ONCE else rate,
            seed=seed,
            arrivals="at-once" if rate == AT_ONCE else "poisson",
            prefixes=max(round(workload.prefixes * share), 1) if workload.prefixes else None,
        )


@lru_cache(maxsize=2)
def _read(file: str) -> Trace:
    return read_trace(file)


@lru_cache(maxsize=64)
def _fingerprint(file: str) -> str:
    try:
        return hashlib.sha256(Path(file).read_bytes()).hexdigest()[:16]
    except OSError as error:
        raise InvalidRequest(f"{file} cannot be read: {error.strerror}") from None
