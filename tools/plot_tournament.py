"""The plot of docs/scheduling.md from a tournament's report: `python tools/plot_tournament.py REPORT.json OUT.svg`.

A dot is a setting: the seconds of a rival divided by those of the reference. The bar is their geometric mean.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import matplotlib
import numpy as np
from matplotlib.figure import Figure

FIGURES = {"TTFT mean": "mean TTFT", "e2e mean": "mean latency"}
FARTHEST = 8.0
"""Dots beyond this ratio are drawn at the edge."""


def main(report: Path, out: Path) -> None:
    """Read the report and write the plot."""
    data = json.loads(report.read_text())
    reference = data["reference"]
    rivals = sorted(data["rivals"], key=lambda rival: data["rivals"][rival]["ratio"][0])
    matplotlib.rcParams["svg.hashsalt"] = "tournament"
    figure = Figure(figsize=(9, 3.6), layout="constrained")
    spread = np.random.default_rng(0)
    axes = figure.subplots(1, len(FIGURES), sharey=True)
    for plot, (name, label) in zip(axes, FIGURES.items(), strict=True):
        at = data["figures"].index(name)
        for row, rival in enumerate(rivals):
            ratios = [one["seconds"][rival][at] / one["seconds"][reference][at] for one in data["settings"]]
            shown = np.minimum(ratios, FARTHEST)
            plot.plot(shown, row + spread.uniform(-0.25, 0.25, len(shown)), "o", ms=3, alpha=0.45, color="#4477aa")
            mean = min(data["rivals"][rival]["ratio"][at], FARTHEST)
            plot.plot([mean, mean], [row - 0.38, row + 0.38], color="#cc3311", lw=2.5)
        plot.axvline(1, color="black", lw=0.8)
        plot.set_xscale("log", base=2)
        plot.set_xticks([0.5, 1, 2, 4, FARTHEST], ["0.5", "1", "2", "4", f"{FARTHEST:g} or more"])
        plot.set_yticks(range(len(rivals)), [rival.partition("@")[0] for rival in rivals])
        plot.set_xlabel(f"{label}, rival / {reference.partition('@')[0]}")
        plot.grid(axis="x", alpha=0.2)
    figure.savefig(out, metadata={"Date": None}, facecolor="white")


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
