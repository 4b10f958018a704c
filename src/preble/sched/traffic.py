"""What the cluster observed of its requests lately."""

from __future__ import annotations

from collections import deque

ARRIVALS = 100
"""The arrival rate is that of the last this many requests."""

RECENT = 64
"""Means follow about the last this many requests."""

FIRST_OUTPUT = 45.0
"""Tokens a request is expected to generate before any has ended: the default of the paper's authors."""


class Traffic:
    """Running means over all requests (`TrafficView`)."""

    __slots__ = ("_arrivals", "_ended", "_started", "mean_latency", "mean_output_tokens", "mean_ttft")

    def __init__(self) -> None:
        self._arrivals: deque[float] = deque(maxlen=ARRIVALS)
        self._started = 0
        self._ended = 0
        self.mean_ttft = 0.0
        self.mean_latency = 0.0
        self.mean_output_tokens = FIRST_OUTPUT

    @property
    def arrival_rate(self) -> float:
        """Requests per second over the last `ARRIVALS`; 0 before there were two."""
        arrivals = self._arrivals
        if len(arrivals) < 2 or arrivals[-1] <= arrivals[0]:
            return 0.0
        return (len(arrivals) - 1) / (arrivals[-1] - arrivals[0])

    def arrived(self, now: float) -> None:
        """A request was submitted."""
        self._arrivals.append(now)

    def started(self, seconds: float) -> None:
        """A request got its first token after so long."""
        self._started += 1
        self.mean_ttft += (seconds - self.mean_ttft) / min(self._started, RECENT)

    def ended(self, seconds: float, output_tokens: int) -> None:
        """A request ended after so long, having generated so much."""
        self._ended += 1
        share = 1 / min(self._ended, RECENT)
        self.mean_latency += (seconds - self.mean_latency) * share
        self.mean_output_tokens += (output_tokens - self.mean_output_tokens) * share
