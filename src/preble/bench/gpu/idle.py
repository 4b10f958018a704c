"""How long a device waits between the steps of an engine."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from torch.autograd import DeviceType  # type: ignore[attr-defined]
from torch.profiler import ProfilerActivity, profile

from preble.bench.gpu.place import Place

Span = tuple[str, float, float]
"""Name, start and end of something that the device did, in microseconds."""
STEP_BEGINS = "Memcpy HtoD"
"""A step's only copy to the device is the first thing it does there."""


@dataclass(frozen=True, slots=True)
class Idle:
    """Shares of the time from the first step seen to the last."""

    between_steps: float
    """From the last thing that a step did to the first that the next one did."""
    anywhere: float
    """The gaps within steps included."""
    steps: int


def idle_share(place: Place, step: Callable[[], object], steps: int) -> Idle | None:
    """Profile `steps` calls of `step`; None where the profiler saw no steps on the device."""
    if place.toy:
        began = time.perf_counter()
        for _ in range(steps):
            step()
        return Idle(0.0, 0.0, steps) if time.perf_counter() > began else None
    with profile(activities=[ProfilerActivity.CUDA]) as profiler:
        for _ in range(steps):
            step()
        place.synchronize()
    spans = [
        (event.name, float(event.time_range.start), float(event.time_range.end))
        for event in profiler.events() or []
        if event.device_type == DeviceType.CUDA
    ]
    return idle_of(spans)


def idle_of(spans: Sequence[Span]) -> Idle | None:
    """What the spans of one queue say; those before the second step and after the last are left out.

    The first step's copy may have begun before the profiler did.
    """
    ordered = sorted(spans, key=lambda span: span[1])
    begins = [index for index, (name, _, _) in enumerate(ordered) if name.startswith(STEP_BEGINS)]
    if len(begins) < 3:
        return None
    first, last = begins[1], begins[-1]
    total = ordered[last][1] - ordered[first][1]
    between = anywhere = 0.0
    done = ordered[first][2]
    starts = set(begins)
    for index in range(first + 1, last + 1):
        gap = max(0.0, ordered[index][1] - done)
        anywhere += gap
        if index in starts:
            between += gap
        done = max(done, ordered[index][2])
    return Idle(between / total, anywhere / total, len(begins) - 2)
