"""Runs jobs: in a process of the pool, or in an interpreter that has a peer's packages.

As a program it reads one job from standard input and writes its row to standard output. It needs no more than numpy
and what the peer needs.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from importlib import import_module
from pathlib import Path

import preble
from preble.bench.sim.digest import BOUND, digest
from preble.bench.sim.job import Job, Row, fleet_of
from preble.bench.sim.peers import PEERS
from preble.errors import PrebleError
from preble.sched.policies import POLICIES


class PeerFailed(PrebleError):
    """A peer's interpreter does not exist, lacks its packages, or ended with an error."""


def prepare() -> None:
    """For a process of the pool: Ctrl-C just ends it, without a word, and its rows name the sources it has loaded."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    for name in (BOUND, *POLICIES, *PEERS):
        digest(name)


def perform(job: Job, peer_python: str) -> Row:
    """Run a job here, or with the interpreter at `peer_python` if a peer decides.

    Raises:
        PeerFailed: … and that interpreter cannot.
        InvalidRequest: something named in the job does not exist.
    """
    if job.entry is None or job.entry.peer is None:
        return job.run()
    source = str(Path(preble.__file__).parent.parent)
    try:
        done = subprocess.run(
            [peer_python, "-m", __name__],
            input=json.dumps(job.to_dict()),
            env={**os.environ, "PYTHONPATH": source},
            capture_output=True,
            text=True,
            check=False,
        )
    except OSError as error:
        raise PeerFailed(f"{peer_python}: {error.strerror}") from None
    if done.returncode:
        last = done.stderr.strip().splitlines()[-1:] or ["no message"]
        raise PeerFailed(f"{job.entry.peer} ended with status {done.returncode}: {last[0]}")
    row: Row = json.loads(done.stdout.splitlines()[-1])
    return row


def main() -> None:
    """The program."""
    job = Job.from_dict(json.loads(sys.stdin.read()))
    assert job.entry is not None
    assert job.entry.peer is not None
    module = import_module(f"preble.bench.sim.peers.{PEERS[job.entry.peer]}")
    _, fleet = fleet_of(job)
    with module.make_router(fleet) as router:
        row = job.run(router)
        row["peer"] = module.settings()
    sys.stdout.write(json.dumps(row) + "\n")


if __name__ == "__main__":
    main()
