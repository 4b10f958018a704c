"""When requests arrive: the time of each, from a rate and a kind of traffic."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from preble.errors import InvalidRequest

Seconds = NDArray[np.float64]

BURSTINESS = 3.0
"""Coefficient of variation (standard deviation / mean) of the gaps between `bursty` arrivals; 1 would be Poisson."""


def _poisson(count: int, generator: np.random.Generator) -> Seconds:
    return generator.standard_exponential(count)


def _bursty(count: int, generator: np.random.Generator) -> Seconds:
    shape = BURSTINESS**-2
    return generator.standard_gamma(shape, count) / shape


def _uniform(count: int, generator: np.random.Generator) -> Seconds:
    return np.ones(count)


def _at_once(count: int, generator: np.random.Generator) -> Seconds:
    return np.zeros(count)


_GAPS: dict[str, Callable[[int, np.random.Generator], Seconds]] = {
    "poisson": _poisson,
    "bursty": _bursty,
    "uniform": _uniform,
    "at-once": _at_once,
}
"""Kind -> the gaps between arrivals, in units of their mean."""

ARRIVALS = tuple(_GAPS)
"""Every kind of traffic: `poisson`, independent users; `bursty`, gaps of a Gamma distribution, as BurstGPT
(arXiv 2401.17644) fits to the requests of a public service, with `BURSTINESS` as their coefficient of variation;
`uniform`, one request every 1 / rate seconds; `at-once`, all of them at time 0."""


def arrival_times(kind: str, count: int, rate: float, generator: np.random.Generator) -> Seconds:
    """float64 [count]: seconds since the first arrival, never falling. Fewer arrivals are the beginning of more.

    Args:
        kind: One of `ARRIVALS`.
        count: How many requests, at least 0.
        rate: Requests per second in the long run. `at-once` takes no notice of it.
        generator: Where chance comes from.

    Raises:
        InvalidRequest: No such kind, a negative count, or a rate that is not positive and finite.
    """
    if kind not in _GAPS:
        raise InvalidRequest(f"no arrivals of kind {kind!r}; there are {', '.join(ARRIVALS)}")
    if count < 0:
        raise InvalidRequest(f"the number of arrivals must be at least 0, not {count}")
    if not 0 < rate < float("inf"):
        raise InvalidRequest(f"the rate must be a positive number of requests per second, not {rate}")
    times = np.zeros(count)
    if count > 1:
        np.cumsum(_GAPS[kind](count - 1, generator) / rate, out=times[1:])
    return times
