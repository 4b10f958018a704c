"""How requests arrive: how many a second, and how far from evenly."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

WINDOWS = (0.1, 1.0, 10.0, 60.0, 600.0, 3600.0, 86400.0)
"""Seconds over which counts are compared."""
FEWEST_WINDOWS = 10
"""With fewer whole windows than these, the variance of their counts means little."""
SLICES = 100
"""Of the time that a trace takes, for the picture."""


@dataclass(frozen=True, slots=True)
class Dispersion:
    """How much the counts of requests in windows of one length vary."""

    window: float
    """Seconds."""
    windows: int
    """Whole windows in the trace."""
    index: float
    """Variance over mean of the counts: 1 for Poisson arrivals, 0 for a clock's, above 1 for bursts."""

    def as_json(self) -> dict[str, Any]:
        """Plain values."""
        return {"window_s": self.window, "windows": self.windows, "index": self.index}


@dataclass(frozen=True, slots=True, eq=False)
class Arrivals:
    """When requests come."""

    times: NDArray[np.float64]
    """float64 [requests], requests >= 1, ascending: seconds since the first."""

    @property
    def duration(self) -> float:
        """Seconds from the first to the last."""
        return float(self.times[-1])

    @property
    def rate(self) -> float | None:
        """Requests per second; `None` where they all come at once."""
        return (len(self.times) - 1) / self.duration if self.duration else None

    @property
    def variation(self) -> float | None:
        """The coefficient of variation of the times between arrivals: 1 for Poisson arrivals, 0 for a clock's, above 1
        for bursts. `None` where they all come at once."""
        if not self.duration:
            return None
        gaps = np.diff(self.times)
        return float(gaps.std() / gaps.mean())

    @property
    def dispersion(self) -> tuple[Dispersion, ...]:
        """The index of dispersion over those of `WINDOWS` of which the trace has ten, with one request each on average
        (Gusella, "Characterizing the variability of arrival processes with indexes of dispersion", 1991)."""
        return tuple(
            self._dispersion(window)
            for window in WINDOWS
            if self.duration >= FEWEST_WINDOWS * window and len(self.times) * window >= self.duration
        )

    def counts(self) -> tuple[float, NDArray[np.int64]]:
        """The length of a slice of the trace in seconds, and int64 [slices]: how many requests came in each. One slice
        of no length where they all come at once."""
        if not self.duration:
            return 0.0, np.array([len(self.times)], np.int64)
        counts, _ = np.histogram(self.times, SLICES, (0.0, self.duration))
        return self.duration / SLICES, counts

    def as_json(self) -> dict[str, Any]:
        """Plain values."""
        slice_, counts = self.counts()
        return {
            "duration_s": self.duration,
            "requests_per_s": self.rate,
            "gap_variation": self.variation,
            "dispersion": [one.as_json() for one in self.dispersion],
            "over_time": {"slice_s": slice_, "counts": counts.tolist()},
        }

    def _dispersion(self, window: float) -> Dispersion:
        windows = int(self.duration / window)
        counts = np.bincount((self.times / window).astype(np.int64))[:windows]
        return Dispersion(window, windows, float(counts.var() / counts.mean()))
