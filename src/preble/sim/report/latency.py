"""How long requests took, as distribution functions."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping

import numpy as np

from preble.sim.html import Plot, figure_svg
from preble.sim.outcome import Array, Outcome
from preble.sim.report.figures import WIDTH, legend_below, log_axis, new_figure, vertical_line
from preble.sim.slo import SLO

POINTS = 200
"""Of a line: that many quantiles."""
SPAN = 1e5
"""What is smaller than the largest value by more than this is drawn at the left edge."""


def latency_plots(runs: Mapping[str, Outcome]) -> list[Plot]:
    """One per measure that any request has."""
    plots = [
        _plot(runs, "Time to the first token", "seconds", lambda run: run.ttft, lambda slo: slo.ttft),
        _plot(runs, "End-to-end latency", "seconds", lambda run: run.e2e, lambda slo: slo.e2e),
        _plot(runs, "Time per token after the first", "seconds per token", lambda run: run.tpot, lambda slo: slo.tpot),
        _plot(runs, "Queueing, until a replica begins", "seconds", lambda run: run.queueing, lambda slo: math.inf),
    ]
    return [plot for plot in plots if plot is not None]


def _plot(
    runs: Mapping[str, Outcome],
    title: str,
    unit: str,
    measure: Callable[[Outcome], Array],
    bound: Callable[[SLO], float],
) -> Plot | None:
    values = {label: known[~np.isnan(known)] for label, known in ((label, measure(run)) for label, run in runs.items())}
    everything = np.concatenate(list(values.values()))
    if not everything.any():
        return None
    edge = max(everything[everything > 0].min(), everything.max() / SPAN)
    labels = list(runs)
    with new_figure(WIDTH, 3.2, labels) as figure:
        axes = figure.add_subplot()
        for label in labels:
            seconds, shares = distribution_function(np.maximum(values[label], edge))
            axes.plot(seconds, shares, drawstyle="steps-post", label=label)
        lines = axes.get_lines()
        for limit in sorted({bound(run.slo) for run in runs.values()}):
            if edge <= limit <= everything.max():
                vertical_line(axes, limit)
        log_axis(axes, unit)
        axes.set_ylim(0, 1.01)
        axes.yaxis.set_major_formatter("{x:.0%}")
        legend_below(figure, lines, labels)
    return Plot(title, figure_svg(figure, title))


def distribution_function(values: Array) -> tuple[Array, Array]:
    """At most `POINTS` + 1 steps of the share of values that are at most as large; all of them where they are fewer.

    Returns:
        values, rising, and shares, from 0 to 1. Both empty if there are none.
    """
    count = len(values)
    if not count:
        return np.empty(0), np.empty(0)
    ranks = np.unique(np.linspace(0, count - 1, min(count, POINTS)).round().astype(np.int64))
    ordered = np.sort(values)[ranks]
    return np.concatenate((ordered[:1], ordered)), np.concatenate(((0.0,), (ranks + 1) / count))
