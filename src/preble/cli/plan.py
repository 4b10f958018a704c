"""Plan capacity: the smallest number of replicas on which a trace keeps its SLO.

Simulates the trace on 1, 2, 4, … replicas until enough requests keep the SLO, then narrows it down by bisection: the
answer is enough, and one replica less is not. The exit status is 1 where no number up to --max-replicas is enough.
"""

from __future__ import annotations

import argparse
import json
import math
from pathlib import Path
from typing import TYPE_CHECKING

from preble.cli.fleet_options import (
    add_fleet_arguments,
    add_request_arguments,
    add_slo_argument,
    fleet_settings,
    positive_number,
    read_requests,
)
from preble.cli.options import positive_integer
from preble.cli.output_file import require_writable
from preble.progress import progress_bar

if TYPE_CHECKING:
    from preble.sim.planner import Plan, Probe
    from preble.sim.settings import Settings
    from preble.sim.trace import Trace

HEADER = f"{'replicas':>8}  {'attained':>9}  {'TTFT p99':>10}  {'TPOT p99':>10}  {'utilisation':>11}"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments."""
    add_request_arguments(parser)
    add_fleet_arguments(parser)
    add_slo_argument(parser)
    parser.add_argument(
        "--attain",
        type=positive_number,
        default=0.99,
        metavar="SHARE",
        help="of the requests that must keep the SLO (default: %(default)s)",
    )
    parser.add_argument(
        "--max-replicas",
        type=positive_integer,
        default=256,
        metavar="N",
        help="try no more than these (default: %(default)s)",
    )
    parser.add_argument("--json", type=Path, metavar="OUT", help="also write every number to this file")


def run(args: argparse.Namespace) -> int:
    """Run the command."""
    require_writable(args.json, inputs=() if args.trace is None else (args.trace,))
    trace = read_requests(args)
    fewest = max([1, *(one.replica + 1 for one in (*args.fail, *args.slow))])
    settings = fleet_settings(args, fewest)
    plans = [_plan(args, trace, settings, policy) for policy in args.policy]
    if args.json is not None:
        fleet = settings.to_dict()
        del fleet["replicas"]  # it is the question
        document = {
            "settings": {
                "trace": trace.name,
                "requests": len(trace.requests),
                "rate": trace.rate,
                "slo": str(args.slo),
                "attain": args.attain,
                "max_replicas": args.max_replicas,
                **fleet,
            },
            "policies": [one.to_dict() for one in plans],
        }
        args.json.write_text(json.dumps(document, indent=2) + "\n", encoding="utf-8")
    return 0 if all(one.replicas is not None for one in plans) else 1


def _plan(args: argparse.Namespace, trace: Trace, settings: Settings, policy: str) -> Plan:
    from preble.sim.planner import plan

    print(
        f"{trace.name}: {len(trace.requests):,} requests, {trace.rate:.3g} per second; {policy} on "
        f"{settings.cost_model.name} with {settings.kv_tokens:,} KV tokens; {percent(args.attain)} within {args.slo}",
        flush=True,
    )
    header = iter((HEADER,))

    def print_probe(probe: Probe) -> None:
        for line in (*header, row(probe)):
            print(line, flush=True)

    result = plan(
        trace,
        settings,
        args.slo,
        policy=policy,
        attain=args.attain,
        max_replicas=args.max_replicas,
        probed=print_probe,
        watch=lambda replicas: progress_bar(len(trace.requests), shown=True, label=f"on {replicas}"),
    )
    print(verdict(result), flush=True)
    return result


def row(probe: Probe) -> str:
    """A line under `HEADER`."""

    def seconds(value: float | None) -> str:
        return "-" if value is None else f"{value:.4g} s"

    return (
        f"{probe.replicas:>8}  {percent(probe.attainment):>9}  {seconds(probe.ttft_p99):>10}  "
        f"{seconds(probe.tpot_p99):>10}  {percent(probe.utilization):>11}"
    )


def percent(share: float) -> str:
    """Rounded down to hundredths, so that what is missing never rounds away."""
    return f"{math.floor(round(share * 1e4, 6)) / 100:.2f} %"


def verdict(plan: Plan) -> str:
    """The answer in a sentence."""
    if plan.too_long:
        return (
            f"No number of replicas is enough: {plan.too_long:,} of {plan.requests:,} requests are longer than the KV "
            "pages of a replica (--kv-tokens)."
        )
    if plan.impossible:
        return (
            f"No number of replicas is enough: {plan.hopeless:,} of {plan.requests:,} requests take longer than "
            f"{plan.slo} even alone on an idle replica, with all of their prompts cached that can be."
        )
    hopeless = f" {plan.hopeless:,} requests keep it on no number of replicas." if plan.hopeless else ""
    if plan.replicas is None:
        best = max(plan.probes, key=lambda one: one.attainment)
        are = "replica is" if plan.max_replicas == 1 else "replicas are"
        return (
            f"{plan.max_replicas} {are} not enough: {percent(best.attainment)} at best, on {best.replicas}. "
            f"Try --max-replicas above {plan.max_replicas}.{hopeless}"
        )
    good = plan.probe(plan.replicas)
    assert good is not None
    fewer = plan.probe(plan.replicas - 1)
    besides = f"; on {fewer.replicas}, {percent(fewer.attainment)} do" if fewer is not None else ""
    are = "replica is" if plan.replicas == 1 else "replicas are"
    share = percent(good.attainment)
    return f"{plan.replicas} {are} enough: {share} of the requests keep {plan.slo}{besides}.{hopeless}"
