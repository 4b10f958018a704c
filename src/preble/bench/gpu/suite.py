"""Everything that only a GPU can tell: first whether the kernels are right, then how fast they, the engine and the
cluster are, beside predictions that were written down before.

Each part runs in processes of its own under a time limit, and its results are in a file as soon as they are known.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import multiprocessing
import os
import signal
import sys
import tempfile
import time
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from multiprocessing.context import BaseContext
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

from preble.bench.gpu import report
from preble.bench.gpu.parts import NEEDS_CEILINGS, PART_NAMES, Part, make_parts
from preble.bench.gpu.worker import Order, work

TOTAL_SECONDS = 575.0
"""After this no part runs any longer, so that the table is printed within ten minutes."""
NO_GPU = 2
"""Exit status."""
POLL = 1.0
"""Seconds after which the results so far are written at the latest."""
PATIENCE = 10.0
"""Seconds that a process may take to leave."""
PRELOADED = [
    *("preble.bench.gpu.attention", "preble.bench.gpu.check_tokens", "preble.bench.gpu.cluster"),
    *("transformers.models.auto.tokenization_auto", "transformers.models.llama.modeling_llama"),
]
"""What the processes of a dry run find imported. On a GPU each imports for itself, as no parent may touch CUDA."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments."""
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="folder for the results, as JSON")
    parser.add_argument(
        "--part", action="append", choices=PART_NAMES, metavar="PART", help=f"{', '.join(PART_NAMES)}; default: all"
    )
    parser.add_argument("--quick", action="store_true", help="fewer cases and repetitions")
    parser.add_argument(
        "--dry-run", action="store_true", help="try out the benchmark itself on the CPU; its figures mean nothing"
    )


def run(args: argparse.Namespace) -> int:
    """Run the parts, print the table; 0 if all ran and all that was checked is right, 2 without a GPU."""
    if not args.dry_run and (problem := _problem()) is not None:
        print(f"preble bench gpu: {problem} (--dry-run tries out the benchmark itself)", file=sys.stderr)
        return NO_GPU
    if args.dry_run:
        os.environ["TRITON_INTERPRET"] = "1"
    args.out.mkdir(parents=True, exist_ok=True)
    suite = Suite(args.out, dry_run=args.dry_run, quick=args.quick)
    wanted = set(args.part or PART_NAMES)
    if wanted & set(NEEDS_CEILINGS):
        wanted.add("ceilings")
    if not args.dry_run:
        print(report.predictions_table())
    for part in make_parts(dry_run=args.dry_run):
        if part.name in wanted:
            suite.run(part)
    print(suite.finish())
    return 0 if suite.good else 1


def _problem() -> str | None:
    """Why nothing can be measured here."""
    import torch

    from preble.errors import DeviceError
    from preble.kernels.architecture import architecture_of

    if not torch.cuda.is_available():
        return "no CUDA device is visible to torch"
    try:
        architecture_of(torch.device("cuda", 0))
    except DeviceError as error:
        return str(error)
    return None


@dataclass(slots=True)
class _Running:
    """A process, and what it has to say."""

    order: Order
    process: BaseProcess
    progress: Connection | None


class Suite:
    """The parts that ran, and what came of them.

    Args:
        out: where the results go; it exists.
        dry_run: on the CPU at toy sizes.
        quick: fewer cases and repetitions.
    """

    def __init__(self, out: Path, *, dry_run: bool, quick: bool) -> None:
        self._out = out
        self._dry_run = dry_run
        self._quick = quick
        self._began = time.monotonic()
        self._date = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
        self._ceilings: dict[str, float] = {}
        self._results: dict[str, dict[str, Any]] = {}
        self._log = out / "log.txt"
        self._log.write_text("")
        self._context = _context(dry_run)

    @property
    def good(self) -> bool:
        """Whether all parts ran to their end and nothing was wrong."""
        return all(
            result["state"] == "done" and all(check["passed"] for check in result["checks"])
            for result in self._results.values()
        )

    def run(self, part: Part) -> None:
        """Run a part and write its file."""
        began = time.monotonic()
        limit = began + min(part.seconds, TOTAL_SECONDS - (began - self._began))
        self._say(f"{part.name}: at most {max(limit - began, 0):.0f} s")
        at_once = len(part.tasks) if not self._dry_run else max(2, len(os.sched_getaffinity(0)))
        with tempfile.TemporaryDirectory(prefix="preble-bench-") as folder:
            orders = [
                Order(task, Path(folder) / f"{index}.json", self._log, self._dry_run, self._quick, self._ceilings)
                for index, task in enumerate(part.tasks)
            ]
            states: dict[str, str] = {}
            waiting, running = list(orders), list[_Running]()
            try:
                while (waiting or running) and time.monotonic() < limit:
                    while waiting and len(running) < at_once:
                        running.append(self._start(waiting.pop(0)))
                    wait([one.progress or one.process.sentinel for one in running], timeout=POLL)
                    ended = [one for one in running if not self._alive(one)]
                    running = [one for one in running if one not in ended]
                    states |= {one.order.task.name: f"ended with status {one.process.exitcode}" for one in ended}
                    self._keep(part, orders, states, began)
                states |= {one.order.task.name: "out of time" for one in running}
                states |= {order.task.name: "not started in time" for order in waiting}
            finally:
                for one in running:
                    _end(one.process)
            self._keep(part, orders, states, began)
        result = self._results[part.name]
        self._ceilings |= {figure["key"]: figure["value"] for figure in result["figures"] if part.name == "ceilings"}
        self._say(f"{part.name}: {result['state']} after {time.monotonic() - began:.0f} s")
        for reason in result["errors"]:
            self._say(f"{part.name}: {reason}")

    def finish(self) -> str:
        """Write the summary; returns the table."""
        rows = report.rows(self._results, meaningless=self._dry_run)
        summary = {
            "began": self._date,
            "seconds": time.monotonic() - self._began,
            "meaningless": self._dry_run,
            "quick": self._quick,
            "machine": report.machine(self._dry_run),
            "parts": {
                name: {k: result[k] for k in ("state", "seconds", "errors")} for name, result in self._results.items()
            },
            "checks": report.checks(self._results),
            "table": [row.as_json() for row in rows],
        }
        (self._out / "summary.json").write_text(json.dumps(summary, indent=1) + "\n")
        return report.table(rows, self._results, meaningless=self._dry_run)

    def _start(self, order: Order) -> _Running:
        receive, send = self._context.Pipe(duplex=False)
        process = self._context.Process(target=work, args=(order, send), name=order.task.name)  # type: ignore[attr-defined]
        process.start()
        send.close()
        return _Running(order, process, receive)

    def _alive(self, one: _Running) -> bool:
        """Pass on what a process says; whether it still runs."""
        try:
            while one.progress is not None and one.progress.poll():
                self._say(f"{one.order.task.name}: {one.progress.recv()}")
        except (EOFError, OSError):  # it has closed its end, or died
            one.progress = None
        if one.progress is None:
            one.process.join(PATIENCE)
            _end(one.process)
        return one.process.is_alive()

    def _keep(self, part: Part, orders: list[Order], states: dict[str, str], began: float) -> None:
        """Bring the records of a part's tasks together, and write its file."""
        records = [_read(order, states) for order in orders]
        unfinished = [record["state"] for record in records if record["state"] != "done"]
        result = {
            "part": part.name,
            "state": unfinished[0] if unfinished else "done",
            "seconds": time.monotonic() - began,
            "meaningless": self._dry_run,
            "errors": [f"{record['part']}: {record['error']}" for record in records if record.get("error")],
            "figures": [figure for record in records for figure in record["figures"]],
            "checks": [check for record in records for check in record["checks"]],
            "notes": {record["part"]: record["notes"] for record in records if record["notes"]},
            "tasks": [
                {key: record.get(key) for key in ("part", "state", "seconds", "error", "traceback")}
                for record in records
            ],
        }
        self._results[part.name] = result
        new = self._out / f"{part.name}.json.new"
        new.write_text(json.dumps(result, indent=1) + "\n")
        os.replace(new, self._out / f"{part.name}.json")

    def _say(self, line: str) -> None:
        print(f"[{time.monotonic() - self._began:6.1f} s] {line}", flush=True)


def _context(dry_run: bool) -> BaseContext:
    if not dry_run:
        return multiprocessing.get_context("spawn")
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOADED)
    return context


def _end(process: BaseProcess) -> None:
    """Kill a process that has not ended, and those that it started."""
    if not process.is_alive():
        return
    assert process.pid is not None
    with contextlib.suppress(ProcessLookupError, PermissionError):
        if os.getpgid(process.pid) == process.pid:
            os.killpg(process.pid, signal.SIGKILL)
    process.kill()
    process.join(PATIENCE)


def _read(order: Order, states: dict[str, str]) -> dict[str, Any]:
    """A task's record; what a killed process or one that never began left of it is completed."""
    name = order.task.name
    record: dict[str, Any] = {
        "part": name,
        "state": "running",
        "seconds": 0.0,
        "figures": [],
        "checks": [],
        "notes": {},
    }
    with contextlib.suppress(FileNotFoundError):
        record = json.loads(order.file.read_text())
    if name in states and record["state"] == "running":
        record |= {"state": "failed", "error": states[name]}
    return record
