"""The results as tables."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

from preble.bench.sched.plan import DYNAMO_MICROSECONDS, FLAT_GOAL, MANY_REPLICAS_GOAL, P99_GOAL, PEER_GOALS
from preble.bench.sched.results import ContestResult, FlatResult, FleetResult, PolicyResult, Summary, WorkloadResult

if TYPE_CHECKING:
    from rich.table import Table

_SUBMIT = ("submit p50", "p99", "max")

TITLES = {
    "preble": "preble",
    "dynamo": "Dynamo SelectionService",
    "dynamo-index": "Dynamo RadixTree (index alone)",
    "ray": "Ray PrefixTree (no actor)",
}


def workloads(results: Sequence[WorkloadResult]) -> Table:
    """Whole decisions: medians over rounds, the rate with its range."""
    view = _table(
        f"whole decisions: a request's submit and all its events; µs of processor time; goal: p99 < {P99_GOAL * 1e6:g}",
        left=("workload", "output events"),
        right=("page", "decisions/s", "goal", "met", "p50", "p99", "max", "met", *_SUBMIT, "hit rate"),
    )
    for one in results:
        view.add_row(
            one.workload.name,
            "one per token" if one.streamed else "two",
            f"{one.page_size}",
            _spread([summary.per_second for summary in one.rounds]),
            f"{one.workload.goal:,.0f}",
            _verdict(one.met),
            *_latencies(one.rounds, "whole"),
            _verdict(one.p99_met),
            *_latencies(one.rounds, "submit"),
            f"{one.hit_rate:.0%}",
        )
    return view


def fleets(result: FleetResult) -> Table:
    """Few and many replicas."""
    view = _table(
        "by the number of replicas, mean µs of processor time",
        right=("replicas", "whole decision", "submit", "goal", "met"),
    )
    for replicas in result.whole:
        view.add_row(f"{replicas}", _spread(result.whole[replicas]), _spread(result.submit[replicas]))
    goal = f"<= {MANY_REPLICAS_GOAL:g}"
    view.add_row("ratio", f"{result.whole_ratio:.2f}", f"{result.submit_ratio:.2f}", goal, _verdict(result.met))
    return view


def flatness(result: FlatResult) -> Table:
    """The first, some and the last of very many distinct prompts, and the one that used most of its bound."""
    view = _table(
        f"distinct prompts of {result.prompt_tokens:,} tokens, pages of {result.page_size}",
        right=("prompts so far", "mean µs", "x first", "goal", "met", "pages in tree", "bound", "met", "memory"),
    )
    first = result.segments[0]
    shown = sorted({*range(0, len(result.segments), max(len(result.segments) // 5, 1)), len(result.segments) - 1})
    for index in shown:
        one = result.segments[index]
        last = index == len(result.segments) - 1
        view.add_row(
            f"{one.prompts:,}",
            f"{one.microseconds:.1f}",
            f"{one.microseconds / first.microseconds:.2f}",
            f"<= {FLAT_GOAL:g}" if last else "",
            _verdict(result.met) if last else "",
            f"{one.tree_pages:,}",
            f"{one.bound_pages:,}",
            _verdict(result.memory_met) if last else "",
            "-" if one.resident_bytes is None else f"{one.resident_bytes / 2**20:,.0f} MiB",
        )
    return view


def policies(results: Iterable[PolicyResult]) -> Table:
    """Every policy once."""
    view = _table(
        "policies on the tool-use workload, µs of processor time",
        left=("policy",),
        right=("decisions/s", "p50", "p99", "max", *_SUBMIT, "hit rate"),
    )
    for one in results:
        view.add_row(
            one.name,
            f"{one.summary.per_second:,.0f}",
            *_latencies([one.summary], "whole"),
            *_latencies([one.summary], "submit"),
            f"{one.hit_rate:.0%}",
        )
    return view


def contest(results: Sequence[ContestResult]) -> Table:
    """The scheduler and its peers."""
    references = " / ".join(f"{value:,.0f}" for value in DYNAMO_MICROSECONDS.values())
    view = _table(
        "beside its peers, median µs of processor time: to decide and book, and with the rest of a request's life\n"
        f"when the goal was set, Dynamo's select_and_reserve took {references} µs",
        left=("prompt tokens", "engine"),
        right=("decision", "x preble", "goal", "met", "whole life", "x preble", "on the wall", "hit rate"),
    )
    for result in results:
        for name, rounds in result.rounds.items():
            ours = name == "preble"
            judged = name in PEER_GOALS
            view.add_row(
                f"{result.prompt_tokens:,}" if ours else "",
                TITLES[name],
                _spread([one.decision for one in rounds]),
                "" if ours else f"{result.ratio(name, lambda one: one.decision):.2f}",
                f">= {PEER_GOALS[name]:g}" if judged else "",
                _verdict(result.met) if judged else "",
                _spread([one.whole for one in rounds]),
                "" if ours else f"{result.ratio(name, lambda one: one.whole):.2f}",
                f"{result.median(name, lambda one: one.whole_wall):,.0f}",
                f"{result.median(name, lambda one: one.hit_rate):.0%}",
            )
    return view


def _verdict(met: bool | None) -> str:
    return {True: "[green]yes", False: "[red]no", None: ""}[met]


def _latencies(rounds: Sequence[Summary], what: str) -> list[str]:
    """p50 and p99 as medians over the rounds, and the largest of all."""
    cuts = [statistics.median(getattr(one, f"{what}_{cut}") for one in rounds) for cut in ("p50", "p99")]
    return [f"{value:,.0f}" for value in (*cuts, max(getattr(one, f"{what}_max") for one in rounds))]


def _spread(values: Sequence[float]) -> str:
    median = f"{statistics.median(values):,.0f}"
    return median if len(values) == 1 else f"{median} ({min(values):,.0f} to {max(values):,.0f})"


def _table(title: str, *, left: Sequence[str] = (), right: Sequence[str] = ()) -> Table:
    from rich.table import Table

    view = Table(title=title)
    for name in left:
        view.add_column(name)
    for name in right:
        view.add_column(name, justify="right")
    return view
