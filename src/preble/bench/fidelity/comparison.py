"""How far simulated latencies are from real ones."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from preble.bench.fidelity.recording import Array, Recording, cycles
from preble.bench.fidelity.replay import MeanCost, StepTimes, VaryingCost, replay
from preble.sim.outcome import distribution

if TYPE_CHECKING:
    from rich.table import Table

Mask: TypeAlias = NDArray[np.bool_]

GOAL = 0.15
"""Relative error at most."""
SIMULATIONS = 8
"""Of the variant that draws, each with a seed of its own; figures are their means."""
SLICE = 2.0
"""Seconds."""
FIGURES = ("ttft mean", "ttft p99", "latency mean", "latency p99")


@dataclass(frozen=True, slots=True, eq=False)
class Way:
    """A way to simulate the recording."""

    name: str
    meaning: str
    costs: Sequence[MeanCost]
    """One per simulation."""
    judged: Mask
    """[requests]: whose latencies count."""


@dataclass(frozen=True, slots=True)
class Simulated:
    """What one way to simulate the recording gave."""

    name: str
    meaning: str
    requests: int
    """… judged."""
    figures: dict[str, float]
    """Seconds by `FIGURES`."""
    errors: dict[str, float]
    """Relative: 0.1 is 10 % above what was recorded."""
    spread: dict[str, float]
    """Standard deviation over the simulations, relative to the figure."""
    hit_rate: float
    busy_seconds: list[float]
    """[replicas]"""

    @property
    def worst(self) -> float:
        """The largest error, without its sign."""
        return max(abs(error) for error in self.errors.values())

    def as_json(self) -> dict[str, Any]:
        """Plain values."""
        return {
            "name": self.name,
            "meaning": self.meaning,
            "requests": self.requests,
            "figures": self.figures,
            "errors": self.errors,
            "worst": self.worst,
            "met": self.worst <= GOAL,
            "spread": self.spread,
            "hit_rate": self.hit_rate,
            "busy_seconds": self.busy_seconds,
        }


def compare(recording: Recording) -> list[Simulated]:
    """Simulate the recording in three ways, the plainest first."""
    steps = cycles(recording.steps)
    times = StepTimes.of(steps)
    seen = StepTimes.of(
        [timed for timed, step in zip(steps, recording.steps, strict=True) if not _held_out(step.ended)]
    )
    everything = np.ones(len(recording.ttft), np.bool_)
    unseen = np.array([_held_out(one.arrival) for one in recording.trace.requests])
    ways = [
        Way("mean", "a step takes the mean of its kind and size", [MeanCost(times)], everything),
        Way("varying", "… times what a recorded step was off by, drawn", _draws(times), everything),
    ]
    if unseen.any():
        about = f"the same, fitted in every other {SLICE:g} seconds and judged by the requests of those between"
        ways.append(Way("held out", about, _draws(seen), unseen))
    return [_simulated(recording, way) for way in ways]


def recorded_figures(recording: Recording, judged: Mask | slice = slice(None)) -> dict[str, float]:
    """What was measured of these requests, in seconds by `FIGURES`."""
    return _figures(recording.ttft[judged], recording.e2e[judged])


def table(recording: Recording, simulated: Sequence[Simulated]) -> Table:
    """Real and simulated figures side by side."""
    from rich.table import Table

    view = Table(title="recorded and simulated, seconds (error)")
    view.add_column("")
    for name in FIGURES:
        view.add_column(name, justify="right", no_wrap=True)
    view.add_column("cached", justify="right")
    view.add_column(f"within {GOAL:.0%}")
    figures = recorded_figures(recording)
    view.add_row("recorded", *(f"{figures[name]:.4f}" for name in FIGURES), f"{recording.hit_rate:.1%}", "")
    for one in simulated:
        cells = (f"{one.figures[name]:.4f} ({one.errors[name]:+.1%})" for name in FIGURES)
        verdict = "[green]yes" if one.worst <= GOAL else "[red]no"
        view.add_row(one.name, *cells, f"{one.hit_rate:.1%}", verdict)
    return view


def _draws(times: StepTimes) -> list[MeanCost]:
    return [VaryingCost(times, seed) for seed in range(SIMULATIONS)]


def _held_out(second: float) -> bool:
    """Whether a fit that leaves something out leaves this out. Slices are short, so that both parts see the same
    machine, be it that its other work comes and goes."""
    return bool(second // SLICE % 2)


def _simulated(recording: Recording, way: Way) -> Simulated:
    real = recorded_figures(recording, way.judged)
    outcomes = [replay(recording, cost) for cost in way.costs]
    rows = [
        _figures(one.ttft[way.judged] + recording.latency, one.e2e[way.judged] + recording.latency) for one in outcomes
    ]
    columns = {figure: np.array([row[figure] for row in rows]) for figure in FIGURES}
    figures = {figure: float(column.mean()) for figure, column in columns.items()}
    return Simulated(
        name=way.name,
        meaning=way.meaning,
        requests=int(way.judged.sum()),
        figures=figures,
        errors={figure: value / real[figure] - 1 for figure, value in figures.items()},
        spread={figure: float(column.std() / column.mean()) for figure, column in columns.items()},
        hit_rate=float(np.mean([one.hit_rate for one in outcomes])),
        busy_seconds=np.mean([one.busy_seconds for one in outcomes], axis=0).tolist(),
    )


def _figures(ttft: Array, e2e: Array) -> dict[str, float]:
    by_name = {}
    for label, values in (("ttft", ttft), ("latency", e2e)):
        spread = distribution(values)
        for statistic in ("mean", "p99"):
            value = spread[statistic]
            assert value is not None
            by_name[f"{label} {statistic}"] = value
    return by_name
