"""A worker without an engine, which does as it is told: for tests of what happens around an engine. Runs in the place
of `preble.engine.worker`."""

from __future__ import annotations

import logging
import os
import resource
import signal
import sys
from dataclasses import replace

from preble.engine import worker
from preble.engine.messages import Abort, Delta, Launch, Ready, StepReport, Submit
from preble.outputs import ReplicaStats

STATS = ReplicaStats(0, "cpu", "torch", *([0] * 11), 0.0)


def do(what: str, parent: worker.Parent) -> None:
    """Something that a worker should not do, or seldom does."""
    if what == "raise":
        raise ValueError("the step went wrong")
    if what == "exit":
        os._exit(7)
    if what == "crash":
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))  # leaves no dump
        os.kill(os.getpid(), signal.SIGSEGV)
    if what == "hang":
        signal.pause()
    if what == "garbage":
        parent._connection.sendall(b"not a frame, whatever it is")
    if what == "nonsense":
        parent._connection.sendall(parent._writer.frame(b"a whole frame that holds no message"))
    if what == "print":
        print("on stdout")
        print("on stderr, and long:", "x" * 5000, file=sys.stderr)
        print("y" * 5000, end="")
    if what == "log":
        logging.getLogger("preble.engine").warning("a %s of the engine", "word")
        logging.getLogger("preble.engine").info("too quiet to be sent")
        logging.getLogger("other").error("printed, as nobody else handles it")
        try:
            raise KeyError("lost")
        except KeyError:
            logging.getLogger("preble").exception("an error that is no failure")


def echo(launch: Launch, parent: worker.Parent) -> None:
    """Answer every submitted request with its number of tokens, and do what the id of an aborted one says."""
    stats = replace(STATS, replica=launch.replica)
    parent.send(Ready(10, 100, stats))
    while True:
        commands = parent.take(True)
        for command in commands:
            if isinstance(command, Abort):
                do(command.request_id, parent)
        deltas = [
            Delta(command.request_id, (len(command.token_ids),), command.namespace, (), 0, 0.0)
            for command in commands
            if isinstance(command, Submit)
        ]
        parent.send(StepReport(launch.replica, stats, deltas, []))


worker._serve = echo

if __name__ == "__main__":
    worker.main()
