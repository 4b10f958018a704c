"""The command line: `python -m preble demo | generate | chat | bench`."""

from __future__ import annotations

import argparse
import logging
import os
import sys
from collections.abc import Sequence

from preble import __version__
from preble.errors import PrebleError


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a subcommand; returns the exit status. Errors that Preble raises on purpose become one line."""
    # Read when torch loads its OpenMP: threads then spin briefly between two parallel regions instead of either
    # sleeping at once (a third slower in decode) or burning a core that another process needs.
    os.environ.setdefault("GOMP_SPINCOUNT", "10000")
    from preble.cli import bench, chat, demo, generate

    parser = argparse.ArgumentParser(
        prog="preble", description="Serve LLMs on many GPUs: every prompt where its prefix lies."
    )
    parser.add_argument("--version", action="version", version=f"preble {__version__}")
    parser.add_argument("--verbose", action="store_true", help="log what the cluster does to standard error")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for module in (demo, generate, chat, bench):
        name = module.__name__.rpartition(".")[2]
        summary = (module.__doc__ or "").strip().splitlines()[0]
        command = commands.add_parser(name, help=summary, description=module.__doc__)
        module.add_arguments(command)
        command.set_defaults(run=module.run)
    args = parser.parse_args(arguments)
    logging.basicConfig(
        level=logging.INFO if args.verbose else logging.WARNING, format="%(asctime)s %(name)s: %(message)s"
    )
    try:
        return int(args.run(args))
    except PrebleError as error:
        print(f"preble {args.command}: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130
