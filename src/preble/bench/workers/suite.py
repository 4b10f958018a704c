"""What worker processes cost beside threads, on the CPU, and how long the event loop is kept.

Two clusters of two replicas each, one of threads and one of processes, stay open in one run and answer the same prompts
one after the other; who is first changes with every round. A ratio compares within a round, so that a busy machine hits
both alike, and its median over the rounds is reported. Goals: processes cost at most 5 % of the throughput and 1 ms per
step, and no turn of the event loop takes 10 ms of processor time.
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
import time
from dataclasses import asdict
from pathlib import Path

from preble.bench.report import machine
from preble.bench.shapes import SHAPES, SMALL, write_checkpoint
from preble.bench.workers.comparison import Comparison, table, verdicts
from preble.bench.workers.loop_turns import LoopTurns
from preble.bench.workers.messages import message_costs
from preble.bench.workers.rounds import REPLICAS, WORKERS, Work, measure
from preble.progress import progress_bar

MODELS = {SMALL.name: SMALL, **SHAPES}
BUSY = 0.25
"""Load average per core from which numbers are called unreliable."""
FILE_WIDTH = 150
"""Columns when the output is not a terminal."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments."""
    parser.add_argument(
        "--model", choices=MODELS, default="100m", help="a shape with random weights (default: %(default)s)"
    )
    parser.add_argument("--rounds", type=int, default=7, metavar="N", help="of each kind (default: %(default)s)")
    parser.add_argument("--requests", type=int, default=16, metavar="N", help="at once (default: %(default)s)")
    parser.add_argument("--prompt-tokens", type=int, default=128, metavar="N", help="(default: %(default)s)")
    parser.add_argument("--new-tokens", type=int, default=64, metavar="N", help="per request (default: %(default)s)")
    parser.add_argument("--json", type=Path, metavar="OUT", help="also write every number and setting to this file")


def run(args: argparse.Namespace) -> int:
    """Measure, print the tables, write the JSON; returns the exit status: 0 whatever the numbers are."""
    from rich.console import Console

    from preble.errors import InvalidRequest

    if min(args.rounds, args.requests, args.prompt_tokens) < 1 or args.new_tokens < 2:
        raise InvalidRequest("--rounds, --requests and --prompt-tokens must be at least 1, --new-tokens at least 2")
    console = Console()
    if not console.is_terminal:
        console = Console(width=FILE_WIDTH)
    before = os.getloadavg()
    if before[0] > BUSY * len(os.sched_getaffinity(0)):
        console.print(f"[yellow]load average {before[0]:.1f}: this machine has other work, read ratios only")
    began = time.time()
    work = Work(args.requests, args.prompt_tokens, args.new_tokens)
    comparison = _compare(args.model, work, args.rounds)
    after = os.getloadavg()
    console.print(
        f"{REPLICAS} replicas, {work.requests} requests of {work.prompt_tokens} + {work.new_tokens} tokens, "
        f"{args.rounds} rounds; load average {before[0]:.1f} before, {after[0]:.1f} after"
    )
    console.print(table(comparison))
    console.print(verdicts(comparison))
    if args.json is not None:
        document = {
            "began": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(began)),
            "seconds": time.time() - began,
            "machine": machine(),
            "load_average": {"before": before, "after": after},
            "settings": {**asdict(work), "replicas": REPLICAS, "rounds": args.rounds},
            **comparison.as_json(),
        }
        args.json.parent.mkdir(parents=True, exist_ok=True)
        args.json.write_text(json.dumps(document, indent=2) + "\n", encoding="utf-8")
    return 0


def _compare(model: str, work: Work, rounds: int) -> Comparison:
    turns = LoopTurns()
    with (
        tempfile.TemporaryDirectory(prefix="preble-bench-") as folder,
        progress_bar(rounds * len(WORKERS), shown=True, label="rounds") as advance,
    ):
        shape = MODELS[model]
        write_checkpoint(shape, Path(folder))
        found = turns.run(lambda: measure(folder, work, rounds, shape.vocabulary, turns, advance))
    return Comparison(model, found, message_costs(work.requests // REPLICAS or 1, work.prompt_tokens))
