"""A study as an HTML page with plots."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import numpy as np

from preble.sim.html import COLOURS, INK, Plot, Section, figure_svg, page, plot_style
from preble.sim.study import tables
from preble.sim.study.distribution import Distribution
from preble.sim.study.study import Study

if TYPE_CHECKING:
    from matplotlib.axes import Axes

TERMS = "\n\n".join(
    [
        "A token is shared where another request's prompt is the same up to there, in whole blocks. The ideal hit rate "
        "is the share of all prompt tokens that an earlier request shares: what a cache that never forgets would hit.",
        "The key portion of a prompt is the deepest run of the prefix tree on its path that has more tokens than all "
        "before it. Requests with the same key portion belong on the same replica.",
        "The variation is the standard deviation of the gaps between arrivals over their mean, the dispersion the "
        "variance of the number of requests in windows of that length over its mean. Both are 1 for Poisson arrivals "
        "and larger for bursts.",
    ]
)

ONE_CACHE = (
    "Of one LRU cache that all requests go through, by how much it holds. One replica that gets all requests hits what "
    "its own size tells; several replicas together hit at best about what their total size tells."
)
HOTTEST = "Runs of the prefix tree with most prompt tokens in them. No two have a token in common."


def html_report(study: Study) -> str:
    """One self-contained document, the same for the same trace. Needs matplotlib."""
    sections = [
        Section(text=TERMS, tables=[tables.distributions(study), tables.overview(study)]),
        Section("Lengths, arrivals, sharing", plots=_plots(study)),
    ]
    if study.sharing.hottest:
        sections += [
            Section("A prefix cache", ONE_CACHE, [tables.cache_sizes(study)], [_hit_rates(study)]),
            Section("The hottest shared runs", HOTTEST, [tables.hottest(study)]),
        ]
    else:
        sections.append(Section("A prefix cache", tables.NOTHING_SHARED))
    return page(study.name, *sections, subtitle=tables.headline(study))


def _plots(study: Study) -> list[Plot]:
    return [
        _histogram("Prompt tokens", study.prompt_tokens, "tokens in a prompt"),
        _histogram("Output tokens", study.output_tokens, "tokens in an output"),
        _arrivals(study),
        _sharers(study),
    ]


def _arrivals(study: Study) -> Plot:
    slice_, counts = study.arrivals.counts()
    unit, length = _unit(study.arrivals.duration)

    def paint(axes: Axes) -> None:
        if slice_:
            axes.stairs(counts, np.arange(len(counts) + 1) * slice_ / length, fill=True, alpha=0.8)
            axes.set_ylabel(f"requests in {tables.seconds(slice_)}")
        else:
            axes.bar([0.0], counts, width=0.1)
            axes.set_xlim(-1, 1)
            axes.set_xticks([0.0])
            axes.set_ylabel("requests")
        axes.set_xlabel(f"time, {unit}")
        _from_zero(axes)

    return _plot("Arrivals", paint, "" if slice_ else "They all come at once.")


def _sharers(study: Study) -> Plot:
    sharers = study.sharing.key_portions.requests.values

    def paint(axes: Axes) -> None:
        places = np.concatenate(([1], sharers, [sharers[-1] * 1.5]))
        for label, weights, line in (("key portions", np.ones_like(sharers), "-"), ("requests", sharers, "--")):
            share = 100 * np.cumsum(weights) / weights.sum()
            axes.step(places, np.concatenate(([0], share, [100])), line, where="post", label=f"of {label}")
        _log_scale(axes, "requests with the same key portion, at most")
        axes.set_ylabel("share, %")
        axes.set_ylim(0, 105)
        axes.legend(loc="lower right", bbox_to_anchor=(1, 1), ncols=2)

    return _plot("Requests per key portion", paint)


def _hit_rates(study: Study) -> Plot:
    def paint(axes: Axes) -> None:
        curve, ideal = study.cache.curve, study.sharing.ideal_hit_rate
        axes.plot([one.tokens for one in curve], [100 * one.hit_rate for one in curve], marker="o", markersize=3)
        axes.axhline(100 * ideal, color=INK, linestyle=":", linewidth=1)
        axes.set_ylim(0, 108 * ideal)
        _log_scale(axes, "cache, tokens")
        axes.set_ylabel("hit rate, %")

    return _plot("Hit rate by cache size", paint, "Dotted: the ideal hit rate.")


def _histogram(title: str, distribution: Distribution, label: str) -> Plot:
    def paint(axes: Axes) -> None:
        histogram = distribution.histogram()
        axes.stairs(histogram.counts, histogram.edges, fill=True, alpha=0.8)
        axes.axvline(distribution.mean, color=COLOURS[1], linewidth=1.2, label=f"mean {distribution.mean:,.0f}")
        axes.axvline(
            distribution.percentile(50),
            color=INK,
            linestyle=":",
            linewidth=1.2,
            label=f"median {distribution.percentile(50):,.0f}",
        )
        _log_scale(axes, label)
        axes.set_ylabel("requests")
        _from_zero(axes)
        axes.legend(loc="lower right", bbox_to_anchor=(1, 1), ncols=2)

    return _plot(title, paint)


def _plot(title: str, paint: Callable[[Axes], None], caption: str = "") -> Plot:
    from matplotlib.figure import Figure

    with plot_style():
        figure = Figure(figsize=(6.4, 3.2))
        paint(figure.add_subplot())
    return Plot(title, figure_svg(figure), caption)


def _log_scale(axes: Axes, label: str) -> None:
    """A logarithmic axis that says 20k rather than 2 x 10^4."""
    from matplotlib.ticker import EngFormatter, LogLocator, NullFormatter, NullLocator

    axes.set_xscale("log")
    low, high = axes.get_xlim()
    if high < 2 * low:  # or there would be fractions between the whole numbers
        low, high = low / 1.5, high * 1.5
        axes.set_xlim(low, high)
    decades = np.log10(high / low)
    places = (1.0, 2.0, 5.0) if decades < 4 else (1.0, 3.0) if decades < 6 else (1.0,)
    axes.xaxis.set_major_locator(LogLocator(subs=places))
    axes.xaxis.set_major_formatter(EngFormatter(sep=""))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_minor_formatter(NullFormatter())
    axes.set_xlabel(label)


def _from_zero(axes: Axes) -> None:
    from matplotlib.ticker import MaxNLocator

    axes.set_ylim(bottom=0)
    axes.yaxis.set_major_locator(MaxNLocator(5, integer=True))


def _unit(duration: float) -> tuple[str, float]:
    """The unit of a time axis and its length in seconds."""
    for unit, length in (("days", 86400.0), ("hours", 3600.0), ("minutes", 60.0)):
        if duration >= 2 * length:
            return unit, length
    return "seconds", 1.0
