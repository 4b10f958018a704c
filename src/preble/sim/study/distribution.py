"""How numbers of tokens or requests are distributed."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

PERCENTILES = (50, 90, 95, 99)


@dataclass(frozen=True, slots=True)
class Histogram:
    """Counts between edges that grow geometrically."""

    edges: tuple[int, ...]
    """One more than there are counts. A value belongs to the interval that starts at it or below."""
    counts: tuple[int, ...]

    def as_json(self) -> dict[str, Any]:
        """Plain values."""
        return {"edges": list(self.edges), "counts": list(self.counts)}


@dataclass(frozen=True, slots=True, eq=False)
class Distribution:
    """Of integers from 1."""

    values: NDArray[np.int64]
    """int64 [count], count >= 1, ascending."""

    @classmethod
    def of(cls, values: ArrayLike) -> Distribution:
        """Of these, in any order."""
        return cls(np.sort(np.asarray(values, np.int64)))

    @property
    def total(self) -> int:
        """Their sum."""
        return int(self.values.sum())

    @property
    def mean(self) -> float:
        """Their mean."""
        return float(self.values.mean())

    @property
    def max(self) -> int:
        """The largest."""
        return int(self.values[-1])

    def percentile(self, percent: float) -> float:
        """Interpolated linearly between the two values closest in rank."""
        return float(np.percentile(self.values, percent))

    def histogram(self, bins: int = 30) -> Histogram:
        """From the smallest value to the largest in at most so many bins."""
        low, high = int(self.values[0]), self.max
        # Rounded to whole numbers, the first edges may coincide; they count once.
        edges = np.unique(np.rint(np.geomspace(low, high + 1, bins + 1)).astype(np.int64))
        counts, _ = np.histogram(self.values, edges)
        return Histogram(tuple(edges.tolist()), tuple(counts.tolist()))

    def as_json(self) -> dict[str, Any]:
        """Plain values."""
        percentiles = {f"p{percent}": self.percentile(percent) for percent in PERCENTILES}
        return {
            "total": self.total,
            "mean": self.mean,
            **percentiles,
            "max": self.max,
            "histogram": self.histogram().as_json(),
        }
