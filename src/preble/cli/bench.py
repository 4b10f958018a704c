"""Measure Preble against its peers, side by side in one run."""

from __future__ import annotations

import argparse


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments."""
    from preble.bench import engine
    from preble.bench.fidelity import suite as fidelity
    from preble.bench.gpu import suite as gpu
    from preble.bench.sched import suite as sched
    from preble.bench.sim import suite as sim

    suites = parser.add_subparsers(dest="suite", required=True, metavar="SUITE")
    suite = suites.add_parser(
        "engine", help="the engine against transformers and llama.cpp", description=engine.__doc__
    )
    engine.add_arguments(suite)
    suite.set_defaults(run_suite=engine.run)
    suite = suites.add_parser(
        "sched", help="the global scheduler against those of Dynamo and Ray", description=sched.__doc__
    )
    sched.add_arguments(suite)
    suite.set_defaults(run_suite=sched.run)
    suite = suites.add_parser("gpu", help="the kernels, the engine and the cluster on a GPU", description=gpu.__doc__)
    gpu.add_arguments(suite)
    suite.set_defaults(run_suite=gpu.run)
    suite = suites.add_parser(
        "fidelity", help="the simulator against a real run of the CPU engine", description=fidelity.__doc__
    )
    fidelity.add_arguments(suite)
    suite.set_defaults(run_suite=fidelity.run)
    suite = suites.add_parser("sim", help="policies against each other, in simulation", description=sim.__doc__)
    sim.add_arguments(suite)
    suite.set_defaults(run_suite=sim.run)


def run(args: argparse.Namespace) -> int:
    """Run the command."""
    return int(args.run_suite(args))
