"""What the plots of a report have in common."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from math import ceil, inf, log10
from statistics import median_high
from typing import TYPE_CHECKING

from preble.sim.html import INK, plot_style
from preble.sim.settings import Failure

if TYPE_CHECKING:
    from matplotlib.artist import Artist
    from matplotlib.axes import Axes
    from matplotlib.axis import Axis
    from matplotlib.figure import Figure

WIDTH = 6.4
"""Inches of a plot that shares the width of the page with another."""
FULL_WIDTH = 12.8
"""… of one that has it all."""
LEGEND_ROW = 0.22
"""Inches."""
TICKS = {
    0.7: tuple(range(1, 10)),
    1.2: (1, 1.5, 2, 3, 5, 7),
    2.5: (1, 2, 5),
    4.0: (1, 3),
    inf: (1,),
}
"""Up to how many decades of a logarithmic axis which multiples of powers of ten are written at it."""


@contextmanager
def new_figure(width: float, height: float, legend: Sequence[str] = ()) -> Iterator[Figure]:
    """An empty figure in the style of reports, which has room for a legend below plots of that height."""
    from matplotlib.figure import Figure

    rows = ceil(len(legend) / legend_columns(width, legend)) if legend else 0
    with plot_style():
        yield Figure(figsize=(width, height + LEGEND_ROW * rows))


def legend_columns(width: float, labels: Sequence[str]) -> int:
    """How many entries of a legend stand side by side in so many inches."""
    widest = 0.65 + 0.075 * max(map(len, labels), default=0)
    return max(1, min(int(width / widest), len(labels)))


def legend_below(figure: Figure, handles: Sequence[Artist], labels: Sequence[str]) -> None:
    """Name lines below the plots, where they cover nothing."""
    columns = legend_columns(figure.get_figwidth(), labels)
    figure.legend(handles, labels, loc="outside lower center", ncols=columns, handlelength=2.8)


def mark_failures(axes: Axes, failures: Iterable[Failure]) -> None:
    """A line at each time at which a replica is lost."""
    for at in sorted({failure.at for failure in failures}):
        vertical_line(axes, at)


def vertical_line(axes: Axes, at: float) -> None:
    axes.axvline(at, color=INK, linestyle=":", linewidth=1.0, alpha=0.7)


def log_axis(axes: Axes, label: str) -> None:
    """A logarithmic horizontal axis with plain numbers: 0.05 rather than 5 x 10^-2."""
    from matplotlib.ticker import LogLocator, NullFormatter, NullLocator

    axes.set_xscale("log")
    low, high = axes.get_xlim()
    if high < 2 * low:  # or there might be no round number between them
        low, high = low / 1.5, high * 1.5
        axes.set_xlim(low, high)
    decades = log10(high / low)
    places = next(places for most, places in TICKS.items() if decades < most)
    axes.xaxis.set_major_locator(LogLocator(subs=places))
    axes.xaxis.set_major_formatter(lambda value, _: f"{value:,.9f}".rstrip("0").rstrip("."))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_minor_formatter(NullFormatter())
    axes.set_xlabel(label)


def common_limit(largest: Sequence[float], slack: float) -> float:
    """Where an axis ends that runs share, by the largest value of each: if a minority has far more than the others, its
    lines leave the plot, so that those of the others can still be read."""
    return min(max(largest), slack * median_high(largest)) or max(largest)


def whole_numbers(axis: Axis) -> None:
    """No fractions at an axis that counts."""
    from matplotlib.ticker import MaxNLocator

    axis.set_major_locator(MaxNLocator("auto", integer=True, steps=[1, 2, 5, 10]))


def time_axis(axes: Axes, end: float) -> None:
    """A horizontal axis from 0 to so many seconds."""
    axes.set_xlim(0, end)
    axes.xaxis.set_major_formatter("{x:,g}")
    axes.set_xlabel("seconds since the first arrival")
