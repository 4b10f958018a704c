"""The load of every replica over time, one panel per policy."""

from __future__ import annotations

from collections.abc import Mapping
from math import ceil
from typing import TYPE_CHECKING

import numpy as np

from preble.sim.html import COLOURS, Plot, figure_svg
from preble.sim.outcome import Array, Outcome
from preble.sim.report.figures import (
    FULL_WIDTH,
    common_limit,
    legend_below,
    mark_failures,
    new_figure,
    time_axis,
    whole_numbers,
)
from preble.sim.report.history import LOAD_SLACK, shown_seconds

if TYPE_CHECKING:
    from matplotlib.artist import Artist
    from matplotlib.axes import Axes

MOST_LINES = 8
"""With more replicas than this, a band stands for them."""
POINTS = 200
"""Of a line, at most."""


def load_plots(runs: Mapping[str, Outcome]) -> list[Plot]:
    """One, or none if no run was looked at."""
    runs = {label: run for label, run in runs.items() if len(run.samples.times)}
    if not runs:
        return []
    columns = min(len(runs), 2 if len(runs) == 4 else 3)
    rows = ceil(len(runs) / columns)
    replicas = max(run.settings.replicas for run in runs.values())
    legend: dict[str, Artist] = {}
    with new_figure(FULL_WIDTH, 0.6 + (2.2 if rows > 1 else 3.0) * rows, [""] * min(replicas, MOST_LINES)) as figure:
        panels = figure.subplots(rows, columns, sharex=True, sharey=True, squeeze=False).flatten()
        for axes, (label, run) in zip(panels, runs.items(), strict=False):
            legend = _draw(axes, run) | legend
            mark_failures(axes, run.settings.failures)
            axes.set_title(label)
            time_axis(axes, shown_seconds(runs))
        top = common_limit([float(_load(run).max()) for run in runs.values()], LOAD_SLACK)
        panels[0].set_ylim(0, 1.05 * max(top, 1.0))
        whole_numbers(panels[0].yaxis)
        for axes in panels[len(runs) :]:
            axes.remove()
        for axes in panels[: len(runs)]:
            axes.label_outer()
        figure.supylabel("requests", fontsize="medium")
        legend_below(figure, list(legend.values()), list(legend))
    return [Plot("Requests running and waiting", figure_svg(figure), wide=True)]


def _load(run: Outcome) -> Array:
    """[looks, replicas]: requests that run or wait."""
    return run.samples.column("running") + run.samples.column("waiting")


def _draw(axes: Axes, run: Outcome) -> dict[str, Artist]:
    """The lines, by what they show."""
    load = _load(run)
    step = ceil(len(load) / POINTS)
    times, load = run.samples.times[::step], load[::step]
    if load.shape[1] <= MOST_LINES:
        lines = axes.plot(times, load, linewidth=1.2)
        return {f"replica {number}": line for number, line in enumerate(lines)}
    band = axes.fill_between(times, load.min(axis=1), load.max(axis=1), color=COLOURS[0], alpha=0.3, linewidth=0)
    (middle,) = axes.plot(times, np.median(load, axis=1), color=COLOURS[0])
    return {"median replica": middle, "from the least to the most loaded": band}
