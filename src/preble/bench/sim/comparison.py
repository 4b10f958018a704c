"""How much better one entry is than another, and how sure that is.

Every setting gives a ratio per figure, rival to reference: above 1 the reference is better. Over settings they are
summed up by geometric means, with an interval from a bootstrap over settings. In one setting, the interval is from a
bootstrap over requests: both entries served the same ones, so the same are drawn for both, in blocks of consecutive
requests, as these wait for each other.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from preble.bench.sim.job import Row, seconds_of

Array = NDArray[np.float64]

FIGURES = ("TTFT mean", "TTFT p99", "e2e mean", "e2e p99")
LEVEL = 0.95
"""Of the intervals."""
BLOCKS = 50
"""Into so many the requests of a setting are cut."""
RESAMPLES = 300
"""Of the requests of a setting."""
SETTING_RESAMPLES = 4000
TOLERANCE = 1.05
"""A reference loses a setting if a rival is better by more than this, beyond the interval."""


@dataclass(frozen=True, slots=True, eq=False)
class Latencies:
    """What an entry did with the requests of a setting, those of all seeds after each other."""

    ttft: Array
    """[requests] seconds."""
    e2e: Array

    @classmethod
    def of(cls, rows: Sequence[Row]) -> Latencies:
        """From the rows of all seeds."""
        ttft, e2e = (np.concatenate([seconds_of(row, name) for row in rows]) for name in ("ttft", "e2e"))
        return cls(ttft, e2e)

    @property
    def figures(self) -> Array:
        """[4] seconds, as in `FIGURES`."""
        return np.array([*_mean_p99(self.ttft), *_mean_p99(self.e2e)])

    def resampled(self, drawn: NDArray[np.int64]) -> Array:
        """[resamples, 4]: the figures of each row of positions."""
        return np.stack([*_mean_p99(self.ttft[drawn]), *_mean_p99(self.e2e[drawn])], axis=1)


@dataclass(frozen=True, slots=True, eq=False)
class Ratio:
    """Rival to reference, by figure: [4] each."""

    value: Array
    low: Array
    high: Array
    """Ends of the interval."""


def ratios_in_setting(rivals: Mapping[str, Latencies], reference: Latencies, seed: int = 0) -> dict[str, Ratio]:
    """Every rival against the reference, on the same requests of one setting."""
    drawn = _blocks(len(reference.ttft), np.random.default_rng(seed))
    base, samples = reference.figures, reference.resampled(drawn)
    ratios = {}
    for name, rival in rivals.items():
        low, high = _interval(rival.resampled(drawn) / samples)
        ratios[name] = Ratio(rival.figures / base, low, high)
    return ratios


def mean_ratio(ratios: Sequence[Array], seed: int = 0) -> Ratio:
    """Geometric means over settings of [4] ratios."""
    logs = np.log(np.stack(ratios))
    drawn = np.random.default_rng(seed).integers(0, len(logs), (SETTING_RESAMPLES, len(logs)))
    low, high = _interval(np.exp(logs[drawn].mean(axis=1)))
    return Ratio(np.exp(logs.mean(axis=0)), low, high)


def _mean_p99(values: Array) -> tuple[Array, Array]:
    """Over the last axis."""
    return values.mean(axis=-1), np.quantile(values, 0.99, axis=-1, method="inverted_cdf")


def _blocks(count: int, generator: np.random.Generator) -> NDArray[np.int64]:
    """[resamples, about count]: positions."""
    length = max(round(count / BLOCKS), 1)
    starts = generator.integers(0, count - length + 1, (RESAMPLES, -(-count // length)))
    drawn: NDArray[np.int64] = (starts[:, :, None] + np.arange(length)).reshape(RESAMPLES, -1)
    return drawn


def _interval(samples: Array) -> tuple[Array, Array]:
    tail = (1 - LEVEL) / 2
    low, high = np.quantile(samples, (tail, 1 - tail), axis=0)
    return low, high
