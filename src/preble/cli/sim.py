"""Simulate a fleet: policies on the same requests, with a cost model in place of the GPUs.

The requests are those of a trace file or made up (--workload). Every policy serves them on a fleet of its own; the
schedulers and their caches are the ones that serve real requests. The same arguments give the same results, but for
the speed of decisions.
"""

from __future__ import annotations

import argparse
import json
import textwrap
from pathlib import Path
from typing import TYPE_CHECKING, Any

from preble.cli.fleet_options import (
    add_fleet_arguments,
    add_request_arguments,
    add_slo_argument,
    fleet_settings,
    read_requests,
)
from preble.cli.options import note
from preble.cli.output_file import require_writable
from preble.progress import progress_bar
from preble.sim.workloads import ARRIVALS

if TYPE_CHECKING:
    from preble.sim.outcome import Outcome
    from preble.sim.settings import Settings
    from preble.sim.slo import SLO
    from preble.sim.trace import Trace

COLUMNS = {
    "policy": "",
    "completed": "",
    "hit": "cached share of the prompt tokens",
    "TTFT": "seconds to the first token: mean",
    "TTFT p99": "",
    "TPOT": "seconds per token after it",
    "latency": "seconds to the last token: mean",
    "latency p99": "",
    "queueing": "seconds until a replica began: mean",
    "imbalance": "busy seconds of the busiest replica / mean",
    "decisions/s": "of this computer, events included",
    "goodput": "requests per second within",
}
"""Heading -> what is to be said about it."""
LEGEND_WIDTH = 80


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments."""
    add_request_arguments(parser)
    add_fleet_arguments(parser, replicas=4)
    add_slo_argument(parser)
    parser.add_argument("--json", type=Path, metavar="OUT", help="also write settings and results to this file")
    parser.add_argument("--html", type=Path, metavar="OUT", help="also write a page with plots to this file")


def run(args: argparse.Namespace) -> int:
    """Run the command."""
    from preble.sim.simulate import simulate

    require_writable(args.json, args.html, inputs=() if args.trace is None else (args.trace,))
    if args.html is not None:
        from preble.sim.html import require_plots

        require_plots()
    settings = fleet_settings(args, args.replicas)
    trace = read_requests(args)
    print(
        f"{trace.name}: {len(trace.requests):,} requests, {trace.rate:.3g} per second, on {settings.replicas} x "
        f"{settings.cost_model.name} with {settings.kv_tokens:,} KV tokens",
        flush=True,
    )
    outcomes: list[Outcome] = []
    for policy in args.policy:
        with progress_bar(len(trace.requests), shown=True, label=policy) as advance:
            outcomes += simulate(trace, settings, (policy,), slo=args.slo, advance=advance)
    _print(outcomes, args.slo)
    if args.json is not None:
        document = {
            "settings": _settings(args, trace, settings),
            "policies": [outcome.to_dict() for outcome in outcomes],
        }
        args.json.write_text(json.dumps(document, indent=2) + "\n", encoding="utf-8")
    if args.html is not None:
        from preble.sim.report import write_report

        write_report(outcomes, args.html)
    return 0


def _print(outcomes: list[Outcome], slo: SLO) -> None:
    """One row per policy: a table on a terminal, else plain lines."""
    from rich import box
    from rich.console import Console
    from rich.table import Table

    rows = [[*COLUMNS], *(_row(outcome) for outcome in outcomes)]
    console = Console(highlight=False)
    if not console.is_terminal:
        widths = _widths(rows)
        for first, *others in rows:
            print("  ".join([first.ljust(widths[0]), *map(str.rjust, others, widths[1:])]).rstrip())
    else:
        if sum(_widths(rows)) + 2 * len(COLUMNS) > console.width:
            rows = [list(row) for row in zip(*rows, strict=True)]  # a column per policy
        table = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False)
        for number, heading in enumerate(rows[0]):
            table.add_column(heading, justify="right" if number else "left")
        for row in rows[1:]:
            table.add_row(*row)
        console.print(table)
    legend = "; ".join(f"{heading}: {meaning}" for heading, meaning in COLUMNS.items() if meaning)
    print(textwrap.fill(f"{legend} {slo}", LEGEND_WIDTH))
    for outcome in outcomes:
        if outcome.refused:
            note(f"{outcome.policy}: {outcome.refused:,} requests are longer than a replica's KV pages (--kv-tokens)")
        lost = outcome.requests - outcome.refused - outcome.completed
        if lost:
            note(f"{outcome.policy}: {lost:,} requests did not end, as every replica is down")


def _widths(rows: list[list[str]]) -> list[int]:
    """Of the columns."""
    return [max(map(len, column)) for column in zip(*rows, strict=True)]


def _row(outcome: Outcome) -> list[str]:
    """What the columns show."""
    figures = outcome.to_dict()

    def seconds(name: str, figure: str = "mean") -> str:
        value: float | None = figures[name][figure]
        return "-" if value is None else f"{value:.3g}" if value < 100 else f"{value:.0f}"

    return [
        outcome.policy,
        f"{outcome.completed:,}",
        f"{outcome.hit_rate:.1%}",
        seconds("ttft"),
        seconds("ttft", "p99"),
        seconds("tpot"),
        seconds("e2e"),
        seconds("e2e", "p99"),
        seconds("queueing"),
        f"{outcome.imbalance:.2f}",
        f"{outcome.decisions_per_second:,.0f}",
        f"{outcome.goodput:.3g}",
    ]


def _settings(args: argparse.Namespace, trace: Trace, settings: Settings) -> dict[str, Any]:
    """All that the results depend on."""
    return {
        "trace": trace.name,
        "workload": args.workload,
        "arrivals": args.arrivals or (ARRIVALS[0] if args.workload else None),
        "requests": len(trace.requests),
        "rate_scale": args.rate_scale,
        "rate": trace.rate,
        "slo": str(args.slo),
        **settings.to_dict(),
    }
