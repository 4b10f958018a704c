"""A tournament as an HTML page."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path

from preble.errors import InvalidRequest
from preble.sim.html import Section, page, require_plots
from preble.sim.outcome import Outcome
from preble.sim.report.history import history_plots
from preble.sim.report.hottest import hottest_tables
from preble.sim.report.latency import latency_plots
from preble.sim.report.load import load_plots
from preble.sim.report.placements import placement_plots
from preble.sim.report.policies import policy_tables
from preble.sim.report.settings import settings_table

LATENCY = (
    "Share of the completed requests that took at most so long: the further to the upper left, the better. What took "
    "no time is drawn at the left edge. Dotted vertical lines: bounds of the SLO, where they are in sight."
)
HISTORY = (
    "Shares are means over a twentieth of the run. Where a policy takes far longer or has far more to do than most, "
    "its lines leave the plots."
)
LOAD = "Requests that run and wait at each replica; without those that still wait to be placed on one."
FAILURES = " Dotted vertical lines: a replica is lost."
PLACEMENTS = "Which rule of its policy placed a request last, by share of the completed requests."
HOTTEST = (
    "The stretches of prompts whose sharing saves most, as the global scheduler knew them when the last request "
    "arrived. Prompts: how many contain it, of those placed in the minutes before. Shared tokens: the stretch's, times "
    "all of these prompts but one. The same name is the same prefix under every policy. Where a replica has only a "
    "part of it, the share is given."
)


def write_report(outcomes: Sequence[Outcome], path: str | os.PathLike[str]) -> None:
    """Write the page of `report_page` to a file; what is there is replaced.

    Raises:
        InvalidRequest: there are no outcomes.
        PrebleError: matplotlib is not installed.
        OSError: the file cannot be written.
    """
    Path(path).write_text(report_page(outcomes), encoding="utf-8")


def report_page(outcomes: Sequence[Outcome]) -> str:
    """One HTML document that loads nothing and runs no script. But for decisions per second it is the same for the same
    outcomes.

    Args:
        outcomes: what `simulate` returned; ratios are to the first one.

    Raises:
        InvalidRequest: there are no outcomes.
        PrebleError: matplotlib is not installed.
    """
    if not outcomes:
        raise InvalidRequest("a report needs at least one outcome")
    require_plots()
    runs = _by_label(outcomes)
    failures = FAILURES if any(run.settings.failures for run in outcomes) else ""
    sections = [
        Section("Policies", _what_happened(runs), policy_tables(runs)),
        Section("Latency", LATENCY, plots=latency_plots(runs)),
        Section("Over time", HISTORY + failures, plots=history_plots(runs)),
        Section("Load of the replicas", LOAD + failures, plots=load_plots(runs)),
        Section("Placements", PLACEMENTS, plots=placement_plots(runs)),
        Section("Hottest prefixes", HOTTEST, hottest_tables(runs)),
        Section("Settings", tables=[settings_table(runs)]),
    ]
    first = outcomes[0]
    fleet = first.settings
    replicas = "1 replica" if fleet.replicas == 1 else f"{fleet.replicas:,} replicas"
    traffic = f"{first.requests:,} requests, {first.rate:,.3g} per second"
    subtitle = " · ".join((traffic, replicas, fleet.cost_model.name, f"seed {fleet.seed}"))
    title = f"{first.trace}: {', '.join(runs) if len(runs) < 4 else f'{len(runs)} policies'}"
    return page(title, *(one for one in sections if one.tables or one.plots), subtitle=subtitle)


def _by_label(outcomes: Sequence[Outcome]) -> dict[str, Outcome]:
    """Every outcome under the name of its policy, numbered where several have the same."""
    runs: dict[str, Outcome] = {}
    for run in outcomes:
        label, count = run.policy, 1
        while label in runs:
            count += 1
            label = f"{run.policy} ({count})"
        runs[label] = run
    return runs


def _what_happened(runs: Mapping[str, Outcome]) -> str:
    """How to read the tables, and what of the requests is missing in them."""
    text = ["Latencies are seconds, of completed requests."]
    if len(runs) > 1:
        text.append(f"The best of each column is marked; small figures are ratios to {next(iter(runs))}.")
    for label, run in runs.items():
        unended = run.requests - run.refused - run.completed
        if unended:
            text.append(f"With {label}, {unended:,} of {run.requests:,} requests did not end: no replica was left.")
    refused = max(run.refused for run in runs.values())
    if refused:
        text.append(f"{refused:,} requests are longer than the KV pages of a replica hold, and were refused.")
    return " ".join(text)
