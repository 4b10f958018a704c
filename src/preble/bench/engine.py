"""Preble's engine against transformers `generate` and llama.cpp, on the same random-weight models in one run.

Every engine runs in a process of its own with the same number of threads, on the same prompts, greedily, to the same
number of tokens. Engines take turns within each round, so that a busy machine hits all of them alike; a ratio compares
within a round, and its median over the rounds is reported.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
import time
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from preble.bench import report
from preble.bench.cases import EIGHT, agreement, measures
from preble.bench.overhead import import_seconds, step_overhead
from preble.bench.peers.process import SPIN, PeerFailed, PeerProcess
from preble.bench.peers.worker import Trace
from preble.bench.shapes import SHAPES, Shape, write_checkpoint
from preble.errors import InvalidRequest

if TYPE_CHECKING:
    from rich.console import Console

PEERS = ("hf", "llama.cpp")
ROUNDS = 3
BUSY = 0.5
"""Load average per core from which numbers are called unreliable."""
FILE_WIDTH = 160
"""Columns when the output is not a terminal."""
SAME_MODEL = 0.5
"""A peer whose first tokens agree less often than this does not run the same model."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments."""
    cores = len(os.sched_getaffinity(0))
    parser.add_argument("--shape", action="append", choices=SHAPES, help="a model shape, repeatable; default: all")
    parser.add_argument("--quick", action="store_true", help="one round of cases a quarter the size; goals mean little")
    parser.add_argument("--json", type=Path, metavar="OUT", help="also write every number and setting to this file")
    parser.add_argument(
        "--peers", default=",".join(PEERS), help="engines to compare with, by commas (default: %(default)s)"
    )
    parser.add_argument(
        "--llama-python", metavar="PATH", help="interpreter that has llama-cpp-python and gguf (default: this one)"
    )
    parser.add_argument("--threads", type=int, default=cores, help="for every engine (default: %(default)s)")


def run(args: argparse.Namespace) -> int:
    """Measure, print the table, write the JSON; returns the exit status.

    Raises:
        InvalidRequest: an argument makes no sense.
        PeerFailed: Preble itself failed; a peer that fails to start is only left out.
    """
    from rich.console import Console

    peers = [name for name in args.peers.split(",") if name]
    for name in peers:
        if name not in PEERS:
            raise InvalidRequest(f"--peers: {name!r} is not one of {', '.join(PEERS)}")
    cores = len(os.sched_getaffinity(0))
    if not 1 <= args.threads <= cores:
        raise InvalidRequest(f"--threads: {args.threads} is not between 1 and the {cores} cores of this machine")
    console = Console()
    if not console.is_terminal:
        console = Console(width=FILE_WIDTH)
    load, began = os.getloadavg(), time.time()
    if load[0] > BUSY * cores:
        console.print(f"[yellow]load average {load[0]:.1f}: this machine is busy, numbers will be low and uneven")
    with tempfile.TemporaryDirectory(prefix="preble-bench-") as folder:
        contest = Contest(peers, Path(folder), console, args.threads, args.llama_python, args.quick)
        shapes = [SHAPES[name] for name in args.shape or SHAPES]
        for shape in shapes:
            contest.measure(shape)
        limits = [
            report.Limit("step around the model, 32 requests", step_overhead(contest.checkpoint(shapes[0])), 1e-3),
            report.Limit("import preble", import_seconds(), 0.15),
        ]
    console.print(report.table(contest.results, limits, [name for name in peers if name not in contest.skipped]))
    if args.json is not None:
        document = {
            "began": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(began)),
            "seconds": time.time() - began,
            "machine": report.machine(),
            "load_average": {"before": load, "after": os.getloadavg()},
            "threads": args.threads,
            "GOMP_SPINCOUNT": SPIN,
            "quick": args.quick,
            "versions": contest.versions,
            "settings": contest.settings,
            "skipped": contest.skipped,
            "shapes": {shape.name: shape.config() for shape in shapes},
            "first_token_agreement": contest.agreement,
            "results": [result.as_json() for result in contest.results],
            "limits": [limit.as_json() for limit in limits],
        }
        args.json.parent.mkdir(parents=True, exist_ok=True)
        args.json.write_text(json.dumps(document, indent=2) + "\n")
    return 0


@dataclass(slots=True)
class Contest:
    """All engines on all shapes, and what came of it."""

    peers: list[str]
    folder: Path
    """For checkpoints and what peers leave behind."""
    console: Console
    threads: int
    llama_python: str | None
    quick: bool
    results: list[report.Result] = field(default_factory=list)
    versions: dict[str, str] = field(default_factory=dict)
    settings: dict[str, dict[str, str]] = field(default_factory=dict)
    agreement: dict[str, dict[str, float]] = field(default_factory=dict)
    """Shape -> engine -> fraction of first tokens equal to transformers', where that ran."""
    skipped: dict[str, str] = field(default_factory=dict)
    """Peer -> why it did not run."""

    def checkpoint(self, shape: Shape) -> Path:
        """Where the shape's checkpoint is written."""
        return self.folder / shape.name

    def measure(self, shape: Shape) -> None:
        """Write the checkpoint, start all engines on it and let them take turns."""
        self.console.print(f"[bold]{shape.name}[/]: {shape.parameters / 1e6:.0f}M parameters")
        self.checkpoint(shape).mkdir()
        write_checkpoint(shape, self.checkpoint(shape))
        with ExitStack() as stack:
            engines: dict[str, PeerProcess] = {}
            for name in ("preble", *(peer for peer in self.peers if peer not in self.skipped)):
                python = self.llama_python if name == "llama.cpp" and self.llama_python else sys.executable
                try:
                    engine = PeerProcess(name, python, self.checkpoint(shape), self.folder, self.threads)
                except PeerFailed as error:
                    if name == "preble":
                        raise
                    self.skipped[name] = str(error)
                    self.console.print(f"[yellow]left out: {error}")
                    continue
                engines[name] = stack.enter_context(engine)
                self.versions |= engine.versions
                self.settings[name] = engine.settings
            self._take_turns(shape, engines)

    def _take_turns(self, shape: Shape, engines: dict[str, PeerProcess]) -> None:
        results = [report.Result(shape.name, wanted, {name: [] for name in engines}) for wanted in measures(shape.name)]
        self.results += results
        cases = list(dict.fromkeys(result.measure.case for result in results))
        for case in cases:
            for engine in engines.values():
                engine.run(case.smaller().work(shape.vocabulary, "warm-up"))
        rounds = 1 if self.quick else ROUNDS
        for number in range(1, rounds + 1):
            for case in cases:
                work = (case.smaller() if self.quick else case).work(shape.vocabulary, f"round {number}")
                traces = {name: engine.run(work) for name, engine in engines.items()}
                for result in results:
                    if result.measure.case == case:
                        self._record(result, traces, f"{shape.name}, round {number} of {rounds}")
                if number == 1 and case == EIGHT and "hf" in traces:
                    self._compare(shape, traces)

    def _record(self, result: report.Result, traces: dict[str, Trace], when: str) -> None:
        for name, trace in traces.items():
            result.rates[name].append(result.measure.rate(trace))
        rates = ", ".join(f"{report.TITLES[name]} {values[-1]:.1f}" for name, values in result.rates.items())
        self.console.print(f"{when}, {result.measure.label}: {rates} tok/s")

    def _compare(self, shape: Shape, traces: dict[str, Trace]) -> None:
        """Whether all engines run the same model."""
        agreed = self.agreement[shape.name] = {
            name: agreement(trace.tokens, traces["hf"].tokens) for name, trace in traces.items() if name != "hf"
        }
        for name, fraction in agreed.items():
            if fraction < SAME_MODEL:
                self.console.print(
                    f"[red]{report.TITLES[name]} agrees with transformers on {fraction:.0%} of first tokens: "
                    "it does not run the same model"
                )
