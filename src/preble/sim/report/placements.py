"""By which rules requests were placed."""

from __future__ import annotations

from collections.abc import Mapping

from preble.sim.html import COLOURS, Plot, figure_svg
from preble.sim.outcome import Outcome
from preble.sim.report.figures import FULL_WIDTH, legend_below, new_figure

HATCHES = ("", "//", "..", "xx")
"""With the colours they tell apart as many rules as there are pairs of them."""
WIDEST_WITHOUT_LABEL = 0.06
"""A part of a bar has no room for its share if it is no larger than this."""


def placement_plots(runs: Mapping[str, Outcome]) -> list[Plot]:
    """One, or none if no request was completed."""
    placed = {label: run for label, run in runs.items() if run.completed}
    if not placed:
        return []
    reasons = list(dict.fromkeys(reason for run in placed.values() for reason in run.reasons))
    with new_figure(FULL_WIDTH, 0.7 + 0.34 * len(placed), reasons) as figure:
        axes = figure.add_subplot()
        left = dict.fromkeys(placed, 0.0)
        bars = []
        for number, reason in enumerate(reasons):
            shares = {label: run.reasons.get(reason, 0) / run.completed for label, run in placed.items()}
            bars.append(
                axes.barh(
                    range(len(placed)),
                    list(shares.values()),
                    left=list(left.values()),
                    height=0.74,
                    color=COLOURS[number % len(COLOURS)],
                    alpha=0.45,
                    hatch=HATCHES[number // len(COLOURS) % len(HATCHES)],
                )
            )
            for row, (label, share) in enumerate(shares.items()):
                if share > WIDEST_WITHOUT_LABEL:
                    axes.text(left[label] + share / 2, row, f"{share:.0%}", ha="center", va="center")
                left[label] += share
        axes.set_xlim(0, 1)
        axes.xaxis.set_major_formatter("{x:.0%}")
        axes.set_yticks(range(len(placed)), list(placed))
        axes.invert_yaxis()
        axes.grid(visible=False)
        legend_below(figure, [bar.patches[0] for bar in bars], reasons)
    return [Plot("Rules of placement", figure_svg(figure), wide=True)]
