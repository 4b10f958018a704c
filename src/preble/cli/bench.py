"""Measure Preble against its peers, side by side in one run."""

from __future__ import annotations

import argparse
import importlib
from collections.abc import Sequence
from typing import Any

from preble.cli.parser import Parser

SUITES = {
    "engine": ("preble.bench.engine", "the engine against transformers and llama.cpp"),
    "sched": ("preble.bench.sched.suite", "the global scheduler against those of Dynamo and Ray"),
    "gpu": ("preble.bench.gpu.suite", "the kernels, the engine and the cluster on a GPU"),
    "fidelity": ("preble.bench.fidelity.suite", "the simulator against a real run of the CPU engine"),
    "sim": ("preble.bench.sim.suite", "policies against each other, in simulation"),
    "workers": ("preble.bench.workers.suite", "worker processes against threads, on the CPU"),
}
"""Name -> module with `add_arguments` and `run`, and what it measures."""


class SuiteParser(Parser):
    """Loads its suite when that is the one asked for: torch, which some need, takes seconds that no command should."""

    def __init__(self, *, module: str, **options: Any) -> None:
        super().__init__(**options)
        self._module = module

    def parse_known_args(self, args: Sequence[str] | None = None, namespace: Any = None) -> Any:  # type: ignore[override]
        self._load()
        return super().parse_known_args(args, namespace)

    def format_help(self) -> str:
        self._load()
        return super().format_help()

    def _load(self) -> None:
        if self.description is None:
            suite = importlib.import_module(self._module)
            self.description = suite.__doc__
            suite.add_arguments(self)
            self.set_defaults(run_suite=suite.run)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments."""
    suites = parser.add_subparsers(dest="suite", metavar="SUITE", title="suites", parser_class=SuiteParser)
    for name, (module, summary) in SUITES.items():
        suites.add_parser(name, module=module, help=summary)


def run(args: argparse.Namespace) -> int:
    """Run the command."""
    return int(args.run_suite(args))
