"""Policies against each other in simulation: every one of them on every setting of a grid.

A setting is a trace (or workload), a number of replicas, a cost model and a load, which is a multiple of the rate at
which a router that reuses prefixes well (`pmc`) is busy all the time. Finished runs are kept in a file of the output
folder, and not run again unless the schedulers, the simulator, the policy or the trace have changed. The report
compares everybody with one of them.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from preble.errors import InvalidRequest

if TYPE_CHECKING:
    from preble.bench.sim.entry import Entry
    from preble.bench.sim.setting import Setting
    from preble.bench.sim.tournament import Tournament

PAPER = "paper"

Number = TypeVar("Number", int, float)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments."""
    from preble.bench.sim.condition import CONDITIONS
    from preble.bench.sim.grids import GRIDS
    from preble.bench.sim.peers import PEERS
    from preble.sched.orders import ORDERS
    from preble.sched.policies import POLICIES
    from preble.sim.workloads import WORKLOADS

    parser.add_argument(
        "--grid",
        choices=(*GRIDS, PAPER),
        default="quick",
        help="what is not said otherwise; 'paper' is the paper's own settings and ablation (default: %(default)s)",
    )
    parser.add_argument("--traces", type=Path, nargs="+", default=[], metavar="FILE", help="trace files of any format")
    parser.add_argument(
        "--workloads", nargs="+", default=[], metavar="NAME", help=f"made to order, of {', '.join(WORKLOADS)}"
    )
    parser.add_argument("--replicas", metavar="N[,N…]", help="how many")
    parser.add_argument("--loads", metavar="X[,X…]", help="multiples of saturation")
    parser.add_argument("--cost", metavar="PRESET[,…]", help="what steps take")
    parser.add_argument(
        "--policies",
        metavar="P[,P…]",
        help=f"of {', '.join(POLICIES)}, each with switches and an order if you like, as in "
        f"e2-paper:rebalancing=off@fcfs; or other routers by their own code: {', '.join(PEERS)}",
    )
    parser.add_argument("--reference", metavar="P", help="whom the others are compared with")
    parser.add_argument(
        "--order",
        choices=tuple(ORDERS),
        default="hrrn",
        help="how replicas serve what waits there, for all policies that name none (default: %(default)s)",
    )
    parser.add_argument(
        "--conditions", default="plain", metavar="C[,C…]", help=f"of {', '.join(CONDITIONS)} (default: %(default)s)"
    )
    parser.add_argument("--requests", type=int, metavar="N", help="the first N of each trace")
    parser.add_argument("--seeds", type=int, default=1, metavar="N", help="runs of each (default: %(default)s)")
    parser.add_argument("--jobs", type=int, default=2, metavar="N", help="processes (default: %(default)s)")
    parser.add_argument(
        "--out",
        type=Path,
        default=Path("bench-results/sim"),
        metavar="DIR",
        help="folder of the finished runs and the report (default: %(default)s)",
    )
    parser.add_argument("--report-only", action="store_true", help="run nothing, report what has been run")
    parser.add_argument(
        "--peer-python",
        default=sys.executable,
        metavar="PATH",
        help="interpreter that has ai-dynamo-runtime, ray[serve] and numpy (default: this one)",
    )


def run(args: argparse.Namespace) -> int:
    """Run the tournament and write its report; returns the exit status.

    Raises:
        InvalidRequest: an argument makes no sense.
    """
    from preble.bench.sim.results import Results
    from preble.bench.sim.tournament import Tournament

    for name in ("requests", "seeds", "jobs"):
        value = getattr(args, name)
        if value is not None and value < 1:
            raise InvalidRequest(f"--{name} must be at least 1, not {value}")
    settings = _settings(args)
    entries, reference = _entries(args)
    tournament = Tournament(settings, entries, Results(args.out), args.peer_python, args.jobs)
    wrong: list[str] = []
    if not args.report_only:
        wrong = tournament.run()
        for complaint in wrong:
            print(complaint, file=sys.stderr)
    _report(args, tournament, reference)
    return 1 if wrong else 0


def _settings(args: argparse.Namespace) -> list[Setting]:
    from preble.bench.sim.condition import CONDITIONS
    from preble.bench.sim.grids import GRIDS, paper_settings
    from preble.bench.sim.setting import Setting
    from preble.bench.sim.source import Source
    from preble.sched.by_name import by_name
    from preble.sched.cost_presets import make_cost

    if args.grid == PAPER:
        given = [name for name in ("traces", "workloads", "replicas", "loads", "cost") if getattr(args, name)]
        if given:
            raise InvalidRequest(f"--grid paper has settings of its own: leave out --{', --'.join(given)}")
        return paper_settings(args.requests, args.seeds)
    grid = GRIDS[args.grid]
    requests = args.requests or grid.requests
    sources = [Source.of_file(path, requests) for path in args.traces]
    workloads = args.workloads or (() if args.traces else grid.workloads)
    sources += [Source(name, None, requests) for name in workloads]
    costs = args.cost.split(",") if args.cost else grid.costs
    conditions = args.conditions.split(",")
    for cost in costs:
        make_cost(cost)
    for condition in conditions:
        by_name("condition", condition, CONDITIONS)
    return [
        Setting(source, replicas, cost, load, condition=condition, seed=seed)
        for source in sources
        for cost in costs
        for replicas in (_numbers("--replicas", args.replicas, int) if args.replicas else grid.replicas)
        for load in (_numbers("--loads", args.loads, float) if args.loads else grid.loads)
        for condition in conditions
        for seed in range(args.seeds)
    ]


def _entries(args: argparse.Namespace) -> tuple[list[Entry], Entry]:
    """Who takes part, and the reference, which always does."""
    from preble.bench.sim.entry import Entry
    from preble.bench.sim.grids import GRIDS, paper_policies

    if args.grid == PAPER:
        names, reference = paper_policies(), paper_policies()[-1]
    else:
        names, reference = list(GRIDS[args.grid].policies), GRIDS[args.grid].reference
    if args.policies:
        names = [name.strip() for name in args.policies.split(",")]
    first = Entry.parse(args.reference or reference, args.order)
    entries = dict.fromkeys([*(Entry.parse(name, args.order) for name in names), first])
    return list(entries), first


def _numbers(option: str, text: str, kind: Callable[[str], Number]) -> list[Number]:
    try:
        numbers = [kind(part) for part in text.split(",")]
    except ValueError:
        numbers = []
    if not numbers or not all(0 < number < float("inf") for number in numbers):
        raise InvalidRequest(f"{option} takes positive numbers by commas, not {text!r}")
    return numbers


def _report(args: argparse.Namespace, tournament: Tournament, reference: Entry) -> None:
    from preble.bench.sim.report import markdown, sections
    from preble.bench.sim.standings import standings
    from preble.sim.html import page

    result = standings(tournament, reference)
    title = f"Tournament: {len(result.contests)} settings, {len(tournament.entries)} policies"
    parts = sections(result, about=_about(args, tournament))
    text = markdown(title, parts)
    document = {**result.to_dict(), "entries": [asdict(entry) for entry in tournament.entries]}
    (args.out / "report.md").write_text(text, encoding="utf-8")
    (args.out / "report.json").write_text(json.dumps(document, indent=2) + "\n", encoding="utf-8")
    (args.out / "report.html").write_text(page(title, *parts), encoding="utf-8")
    print(markdown(title, parts[:3]))
    print(f"The whole report: {args.out / 'report.md'}, .html and .json")


def _about(args: argparse.Namespace, tournament: Tournament) -> str:
    from preble.bench.sim.digest import digest

    settings = tournament.settings
    requests = {setting.source.requests for setting in settings}
    amounts = ", ".join(sorted("as many as are fair" if one is None else f"{one:,}" for one in requests))
    unit = (
        "1 is the rate that the paper's authors gave each workload"
        if args.grid == PAPER
        else "1 is saturation: the requests of a run of pmc in which all arrive at once, by the mean busy seconds "
        "of its replicas"
    )
    facts = {
        "requests": f"{', '.join(dict.fromkeys(one.source.name for one in settings))}; of each {amounts}",
        "replicas": ", ".join(dict.fromkeys(str(one.replicas) for one in settings)),
        "cost models": ", ".join(dict.fromkeys(one.cost for one in settings)),
        "loads": f"{', '.join(dict.fromkeys(f'{one.load:g}' for one in settings))}; {unit}",
        "conditions": ", ".join(dict.fromkeys(one.condition for one in settings)),
        "seeds": str(args.seeds),
        "sources": ", ".join(
            f"{name} {digest(name)}"
            for name in dict.fromkeys(entry.policy.partition(":")[0] for entry in tournament.entries)
        ),
    }
    return "\n\n".join(f"{name.capitalize()}: {fact}." for name, fact in facts.items())
