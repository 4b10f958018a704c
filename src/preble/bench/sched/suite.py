"""The global scheduler by itself: what a request costs it, from `submit` to the last event, and its peers beside it.

One thread, on one core, without engines: replicas that compute nothing send the events of real ones. Only calls of the
scheduler are timed, on the processor's clock, which stands still while another process runs. Peers run on the same
core, in processes of their own, on the same prompts; they and Preble take turns within each round.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING

import preble
from preble.bench.sched.peers import PEERS
from preble.errors import InvalidRequest

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

    from preble.bench.sched.plan import Plan

BUSY = 0.5
"""Load average per core from which numbers are called unreliable."""
FILE_WIDTH = 200
"""Columns when the output is not a terminal."""


@dataclass(slots=True)
class Session:
    """One run of the benchmark. Each part prints what happens, and leaves a table and its figures."""

    plan: Plan
    console: Console
    peers: list[str]
    python: str
    """The interpreter that has the peers' packages."""
    tables: list[Table] = field(default_factory=list)
    figures: dict[str, object] = field(default_factory=dict)

    def workloads(self) -> None:
        """Whole decisions per second."""
        from preble.bench.sched import measures, report

        results = []
        for result in measures.measure_workloads(self.plan):
            results.append(result)
            rate = result.median(lambda one: one.per_second)
            told = "token by token" if result.streamed else "at once"
            self.console.print(
                f"{result.workload.name}, {result.page_size}-token pages, output {told}: {rate:,.0f} decisions/s"
            )
        self.tables.append(report.workloads(results))
        self.figures["workloads"] = [result.as_json() for result in results]

    def replicas(self) -> None:
        """Few and many replicas."""
        from preble.bench.sched import measures, plan, report

        result = measures.measure_fleets(self.plan)
        self.console.print(
            f"a decision among {plan.MANY_REPLICAS} replicas: {result.whole_ratio:.2f} times one among few"
        )
        self.tables.append(report.fleets(result))
        self.figures["replicas"] = result.as_json()

    def flat(self) -> None:
        """Very many distinct prompts."""
        from preble.bench.sched import measures, report

        result = measures.measure_flatness(self.plan)
        self.console.print(f"{result.segments[-1].prompts:,} distinct prompts: {result.ratio:.2f} times the first cost")
        self.tables.append(report.flatness(result))
        self.figures["flat"] = result.as_json()

    def policies(self) -> None:
        """Every policy."""
        from preble.bench.sched import measures, report

        results = []
        for result in measures.measure_policies(self.plan):
            results.append(result)
            self.console.print(f"policy {result.name}: {result.summary.per_second:,.0f} decisions/s")
        self.tables.append(report.policies(results))
        self.figures["policies"] = [result.as_json() for result in results]

    def contest(self) -> None:
        """The peers."""
        from preble.bench.sched import report
        from preble.bench.sched.contest import Contest

        with tempfile.TemporaryDirectory(prefix="preble-bench-") as folder:
            contest = Contest(self.plan, self.peers, self.python, Path(folder), self.console)
            contest.run()
        self.tables.append(report.contest(contest.results))
        self.figures["peers"] = {
            "versions": contest.versions,
            "settings": contest.settings,
            "skipped": contest.skipped,
            "results": [result.as_json() for result in contest.results],
        }


PARTS: dict[str, Callable[[Session], None]] = {
    "workloads": Session.workloads,
    "replicas": Session.replicas,
    "flat": Session.flat,
    "policies": Session.policies,
    "peers": Session.contest,
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments."""
    parser.add_argument("--part", action="append", choices=PARTS, help="what to measure, repeatable; default: all")
    parser.add_argument("--quick", action="store_true", help="one round of little traffic; goals mean little")
    parser.add_argument("--json", type=Path, metavar="OUT", help="also write every number and setting to this file")
    parser.add_argument(
        "--peers", default=",".join(PEERS), help="schedulers to compare with, by commas (default: %(default)s)"
    )
    parser.add_argument(
        "--peer-python",
        metavar="PATH",
        help="interpreter that has ai-dynamo-runtime and ray[serve] (default: this one)",
    )


def run(args: argparse.Namespace) -> int:
    """Measure, print the tables, write the JSON; returns the exit status.

    Raises:
        InvalidRequest: an argument makes no sense.
    """
    from rich.console import Console

    from preble.bench.sched import plan

    peers = [name for name in args.peers.split(",") if name]
    for name in peers:
        if name not in PEERS:
            raise InvalidRequest(f"--peers: {name!r} is not one of {', '.join(PEERS)}")
    console = Console()
    if not console.is_terminal:
        console = Console(width=FILE_WIDTH)
    load, began = os.getloadavg(), time.time()
    if load[0] > BUSY * len(os.sched_getaffinity(0)):
        console.print(f"[yellow]load average {load[0]:.1f}: this machine is busy, numbers will be low and uneven")
    session = Session(plan.QUICK if args.quick else plan.FULL, console, peers, args.peer_python or sys.executable)
    with pinned():
        for part in args.part or PARTS:
            PARTS[part](session)
    for table in session.tables:
        console.print(table)
    if args.json is not None:
        document = {
            "began": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(began)),
            "seconds": time.time() - began,
            "load_average": {"before": load, "after": os.getloadavg()},
            "quick": args.quick,
            **_environment(session.plan),
            **session.figures,
        }
        args.json.parent.mkdir(parents=True, exist_ok=True)
        args.json.write_text(json.dumps(document, indent=2) + "\n")
    return 0


def _environment(sizes: Plan) -> dict[str, object]:
    """Where and how the numbers were taken."""
    from preble.bench.report import machine
    from preble.bench.sched import plan, traffic

    return {
        "machine": machine(),
        "versions": {"preble": preble.__version__, "numpy": version("numpy")},
        "settings": {
            "plan": asdict(sizes),
            "replicas": plan.REPLICAS,
            "capacity_tokens": traffic.CAPACITY_TOKENS,
            "requests_per_virtual_second": traffic.RATE,
            "in_flight_per_replica": traffic.IN_FLIGHT_PER_REPLICA,
            "output_tokens": traffic.OUTPUT_TOKENS,
            "window_seconds": plan.WINDOW,
            "garbage_collector": gc.get_threshold(),
        },
    }


@contextmanager
def pinned() -> Iterator[None]:
    """This thread and the processes that it starts stay on one core; afterwards all is as before."""
    cores = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {max(cores)})
    try:
        yield
    finally:
        os.sched_setaffinity(0, cores)
