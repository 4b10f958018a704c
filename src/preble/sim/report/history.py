"""How runs went over time, one line per policy."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import numpy as np

from preble.sim.html import Plot, figure_svg
from preble.sim.outcome import Array, Outcome
from preble.sim.report.figures import (
    WIDTH,
    common_limit,
    legend_below,
    mark_failures,
    new_figure,
    time_axis,
    whole_numbers,
)

PARTS = 20
"""A share is a mean over the last one of so many parts of the time shown."""
TIME_SLACK = 1.5
LOAD_SLACK = 2.0
"""How far the axes reach beyond what is usual among policies (`common_limit`)."""


def history_plots(runs: Mapping[str, Outcome]) -> list[Plot]:
    """None if no run was looked at."""
    if not any(len(run.samples.times) for run in runs.values()):
        return []
    return [
        Plot("Hit rate", _lines(runs, "cached share of the prompt tokens", hit_rate, share=True)),
        Plot("Busy share", _lines(runs, "share of the replicas' time", busy_share, share=True)),
        Plot(
            "Requests in the system",
            _lines(runs, "requests", in_system),
            "Arrived and not ended; none that never ended.",
        ),
    ]


def shown_seconds(runs: Mapping[str, Outcome]) -> float:
    """Where the time axes end: with the last run, but not where most others have long ended."""
    return common_limit([run.samples.times[-1] for run in runs.values() if len(run.samples.times)], TIME_SLACK)


def hit_rate(run: Outcome) -> Array:
    """[looks]: of the prompts that replicas began to compute not long before; NaN where there were none."""
    cached, prompts = (recent(run.samples.column(name).sum(axis=1)) for name in ("cached_tokens", "prompt_tokens"))
    rate: Array = np.divide(cached, prompts, out=np.full(len(prompts), np.nan), where=prompts > 0)
    return rate


def busy_share(run: Outcome) -> Array:
    """[looks]: of the time not long before and of all replicas. A step counts when it ends, so it must be cut to 1."""
    seconds = recent(run.samples.times) * run.settings.replicas
    busy = recent(run.samples.column("busy_seconds").sum(axis=1))
    return np.minimum(np.divide(busy, seconds, out=np.zeros(len(seconds)), where=seconds > 0), 1.0)


def in_system(run: Outcome) -> Array:
    """[looks]: requests that had arrived and had not ended, but for those that never did."""
    times = run.samples.times
    arrived, ended = np.sort(run.arrived), np.sort(run.arrived + run.e2e)
    return (np.searchsorted(arrived, times, "right") - np.searchsorted(ended, times, "right")).astype(np.float64)


def recent(total: Array) -> Array:
    """[looks]: by how much a running total grew in the `PARTS`th part of the looks before each."""
    back = max(1, len(total) // PARTS)
    return total - np.concatenate((np.zeros(min(back, len(total))), total[:-back]))


def _lines(runs: Mapping[str, Outcome], label: str, measure: Callable[[Outcome], Array], *, share: bool = False) -> str:
    labels = list(runs)
    with new_figure(WIDTH, 3.2, labels) as figure:
        axes = figure.add_subplot()
        values = [measure(run) for run in runs.values()]
        for run, line in zip(runs.values(), values, strict=True):
            axes.plot(run.samples.times, line)
        lines = axes.get_lines()
        mark_failures(axes, (failure for run in runs.values() for failure in run.settings.failures))
        time_axis(axes, shown_seconds(runs))
        axes.set_ylabel(label)
        if share:
            axes.set_ylim(0, 1.01)
            axes.yaxis.set_major_formatter("{x:.0%}")
        else:
            top = common_limit([float(line.max(initial=0)) for line in values], LOAD_SLACK)
            axes.set_ylim(0, 1.05 * max(top, 1.0))
            whole_numbers(axes.yaxis)
        legend_below(figure, list(lines), labels)
        return figure_svg(figure, label)
