"""The command line: `python -m preble demo | generate | chat | sim | study | plan | bench`."""

from __future__ import annotations

import argparse
import logging
import os
import sys
from collections.abc import Sequence

from preble import __version__
from preble.cli.parser import Parser
from preble.errors import PrebleError

BROKEN_PIPE = 128 + 13
"""What a shell reports for a program whose reader went away (SIGPIPE)."""
INTERRUPTED = 128 + 2
"""… and for one that Ctrl-C ended (SIGINT)."""


def make_parser() -> argparse.ArgumentParser:
    """The arguments of all subcommands; parsed, they have a `run` that takes them and returns the exit status."""
    from preble.cli import bench, chat, demo, generate, plan, sim, study

    parser = Parser(
        prog="preble",
        description="Serve LLMs on several replicas, every prompt where its prefix lies.",
        epilog=(
            "Output goes to standard output, everything else to standard error. The exit status is 0, 1 for an error "
            "that one line explains, 2 for wrong arguments, 130 after Ctrl-C."
        ),
    )
    parser.add_argument("--version", action="version", version=f"preble {__version__}")
    parser.add_argument("--verbose", action="store_true", help="log what the cluster does to standard error")
    commands = parser.add_subparsers(
        dest="command",
        metavar="COMMAND",
        title="commands",
        description="preble COMMAND --help says more",
    )
    for module in (demo, generate, chat, sim, study, plan, bench):
        name = module.__name__.rpartition(".")[2]
        summary = (module.__doc__ or "").strip().splitlines()[0]
        command = commands.add_parser(name, help=summary[0].lower() + summary[1:-1], description=module.__doc__)
        module.add_arguments(command)
        command.set_defaults(run=module.run)
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a subcommand; returns the exit status. Errors that Preble raises on purpose become one line."""
    # Read when torch loads its OpenMP: threads then spin briefly between two parallel regions instead of either
    # sleeping at once (a third slower in decode) or burning a core that another process needs.
    os.environ.setdefault("GOMP_SPINCOUNT", "10000")
    args = make_parser().parse_args(arguments)
    logging.basicConfig(
        level=logging.INFO if args.verbose else logging.WARNING, format="%(asctime)s %(name)s: %(message)s"
    )
    try:
        status = int(args.run(args))
        sys.stdout.flush()
    except PrebleError as error:
        print(f"preble {args.command}: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print(file=sys.stderr)
        return INTERRUPTED
    except BrokenPipeError:
        # The interpreter flushes once more on its way out, which must not fail again.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return BROKEN_PIPE
    return status
