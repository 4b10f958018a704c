"""How faithful the simulator is: a real run of the CPU engine, and the same requests simulated.

A cluster of two replicas on the CPU answers prompts that share prefixes, sent at times of a Poisson process. A cost
model is fitted to the steps that its replicas reported, and the recorded arrivals are simulated with it: the same
policy, local order, pages, lengths and shared prefixes. The goal is an error of at most 15 % of mean and p99 TTFT and
end-to-end latency.

Steps on a CPU take longer whenever other programs want its cores, so measure on an idle machine.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import anyio

from preble.bench.fidelity.comparison import GOAL, Simulated, compare, recorded_figures, table
from preble.bench.fidelity.recording import Fleet, Recording, record
from preble.bench.fidelity.requests import make_requests
from preble.bench.report import machine
from preble.progress import progress_bar

TRIAL = 0.3
"""Share of the saturated throughput at which the trial runs that tells what share of the time replicas then compute."""
WARM_UP_SEED, TRIAL_SEED = 1001, 1002
BUSY = 0.25
"""Load average per core from which numbers are called unreliable."""
FILE_WIDTH = 130
"""Columns when the output is not a terminal."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments."""
    parser.add_argument(
        "--requests", type=int, default=600, metavar="N", help="to record, at least 20 (default: %(default)s)"
    )
    parser.add_argument(
        "--load",
        type=float,
        default=0.6,
        metavar="SHARE",
        help="of the time in which replicas are to compute; a warm-up finds the rate (default: %(default)s)",
    )
    parser.add_argument("--policy", default="e2", metavar="NAME", help="of placement (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="of the requests (default: %(default)s)")
    parser.add_argument("--json", type=Path, metavar="OUT", help="also write every number and setting to this file")


def run(args: argparse.Namespace) -> int:
    """Record, simulate, print the table, write the JSON; returns the exit status: 0 whatever the errors are."""
    from rich.console import Console

    from preble.errors import InvalidRequest

    if args.requests < 20 or not 0 < args.load < 1 or args.seed < 0:
        raise InvalidRequest("--requests must be at least 20, --load between 0 and 1, --seed at least 0")
    console = Console()
    if not console.is_terminal:
        console = Console(width=FILE_WIDTH)
    before = os.getloadavg()
    if before[0] > BUSY * len(os.sched_getaffinity(0)):
        console.print(f"[yellow]load average {before[0]:.1f}: this machine has other work, steps will vary")
    began = time.time()
    fleet = Fleet(policy=args.policy)
    rate, recording = anyio.run(_measure, fleet, args)
    after = os.getloadavg()
    simulated = compare(recording)
    console.print(
        f"{len(recording.ttft)} requests at {rate:.2f} per second, {len(recording.steps):,} steps; replicas computed "
        f"{recording.utilization:.0%} of the time; {recording.latency * 1e3:.1f} ms of a TTFT are outside steps; "
        f"load average {before[0]:.1f} before, {after[0]:.1f} after"
    )
    console.print(table(recording, simulated))
    for one in simulated:
        console.print(f"[dim]{one.name}: {one.meaning}")
    if args.json is not None:
        document = {
            "began": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(began)),
            "machine": machine(),
            "load_average": {"before": before, "after": after},
            "settings": {
                **asdict(fleet),
                "requests": args.requests,
                "load": args.load,
                "request_seed": args.seed,
                "goal": GOAL,
            },
            **_as_json(rate, recording, simulated),
        }
        args.json.parent.mkdir(parents=True, exist_ok=True)
        args.json.write_text(json.dumps(document, indent=2) + "\n", encoding="utf-8")
    return 0


async def _measure(fleet: Fleet, args: argparse.Namespace) -> tuple[float, Recording]:
    """Finds the rate, and records at it."""
    trial = max(args.requests // 8, 10)
    with progress_bar(2 * trial + args.requests, shown=True, label="recorded") as advance:
        rate = await find_rate(fleet, args.load, trial, advance=advance)
        trace = make_requests(args.requests, rate, args.seed)
        return rate, await record(fleet, trace, advance=advance)


async def find_rate(fleet: Fleet, load: float, requests: int, *, advance: Callable[[], None]) -> float:
    """Requests per second at which replicas compute about `load` of the time.

    The throughput of requests sent all at once is that of full batches, which no steady traffic reaches: so it only
    gives a rate for a trial.
    """
    at_once = await record(fleet, make_requests(requests, 1.0, WARM_UP_SEED), at_once=True, advance=advance)
    rate = TRIAL * requests / at_once.seconds
    trial = await record(fleet, make_requests(requests, rate, TRIAL_SEED), advance=advance)
    return rate * load / trial.utilization


def _as_json(rate: float, recording: Recording, simulated: list[Simulated]) -> dict[str, Any]:
    requests = [
        {
            "arrival": one.arrival,
            "prompt_tokens": one.prompt_tokens,
            "output_tokens": one.output_tokens,
            "blocks": one.blocks.tolist(),
            "cached_tokens": int(recording.cached_tokens[number]),
            "replica": int(recording.replica[number]),
            "ttft": float(recording.ttft[number]),
            "latency": float(recording.e2e[number]),
        }
        for number, one in enumerate(recording.trace.requests)
    ]
    return {
        "recorded": {
            "rate": rate,
            "seconds": recording.seconds,
            "capacity_tokens": recording.capacity_tokens,
            "figures": recorded_figures(recording),
            "hit_rate": recording.hit_rate,
            "busy_seconds": recording.busy_seconds.tolist(),
            "utilization": recording.utilization,
            "latency_outside_steps": recording.latency,
            "steps": len(recording.steps),
            "requests": requests,
        },
        "simulated": [one.as_json() for one in simulated],
    }
