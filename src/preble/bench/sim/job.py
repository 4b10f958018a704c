"""One simulation of a tournament: what it is, and what is kept of it."""

from __future__ import annotations

import base64
import hashlib
import json
from dataclasses import asdict, dataclass
from time import perf_counter
from typing import Any

import numpy as np
from numpy.typing import NDArray

from preble.bench.sim.digest import BOUND, digest
from preble.bench.sim.entry import Entry
from preble.bench.sim.setting import Setting
from preble.bench.sim.source import AT_ONCE
from preble.errors import InvalidRequest
from preble.sim.bound import bound
from preble.sim.outcome import Outcome
from preble.sim.router import Router
from preble.sim.settings import Settings
from preble.sim.simulate import simulate
from preble.sim.trace import Trace

Row = dict[str, Any]
"""What is kept of a run, in types that JSON knows."""


@dataclass(frozen=True, slots=True)
class Job:
    """A run of one entry on one setting, or without an entry its lower bound."""

    setting: Setting
    entry: Entry | None
    rate: float
    """Requests per second, or `AT_ONCE`."""

    @property
    def name(self) -> str:
        """For people."""
        return f"{BOUND if self.entry is None else self.entry.name} on {self.setting.name}"

    @property
    def key(self) -> str:
        """Two runs with the same key would give the same."""
        policy = BOUND if self.entry is None else self.entry.policy.partition(":")[0]
        what = json.dumps([self.to_dict(), self.setting.source.fingerprint(), digest(policy)], sort_keys=True)
        return hashlib.sha256(what.encode()).hexdigest()[:24]

    def to_dict(self) -> dict[str, Any]:
        """In types that JSON knows."""
        entry = None if self.entry is None else asdict(self.entry)
        rate = None if self.rate == AT_ONCE else self.rate
        return {"setting": self.setting.to_dict(), "entry": entry, "rate": rate}

    @classmethod
    def from_dict(cls, fields: dict[str, Any]) -> Job:
        """What `to_dict` gave."""
        entry = None if fields["entry"] is None else Entry(**fields["entry"])
        rate = AT_ONCE if fields["rate"] is None else fields["rate"]
        return cls(Setting.from_dict(fields["setting"]), entry, rate)

    def run(self, router: Router | None = None) -> Row:
        """Simulate; `router` decides in place of the entry's policy.

        Raises:
            InvalidRequest: something named does not exist, or a trace cannot be read.
        """
        began = perf_counter()
        setting = self.setting
        trace = setting.source.trace(self.rate, setting.replicas, setting.seed)
        row: Row = {"key": self.key, **self.to_dict()}
        if self.entry is None:
            row["bound"] = _bound(trace, setting.fleet(trace, "fcfs"))
        else:
            fleet = setting.fleet(trace, self.entry.order)
            (outcome,) = simulate(trace, fleet, [self.entry.make() if router is None else router])
            row |= _kept(outcome)
        row["seconds"] = perf_counter() - began
        return row


def fleet_of(job: Job) -> tuple[Trace, Settings]:
    """The requests and the fleet of a job with an entry, for a router that has to know it."""
    if job.entry is None:
        raise InvalidRequest("a bound has no fleet to route to")
    trace = job.setting.source.trace(job.rate, job.setting.replicas, job.setting.seed)
    return trace, job.setting.fleet(trace, job.entry.order)


def seconds_of(row: Row, figure: str) -> NDArray[np.float64]:
    """[requests]: `ttft` or `e2e` of every completed request, in order of the trace."""
    return np.frombuffer(base64.b64decode(row[figure]), "<f4").astype(np.float64)


def _bound(trace: Trace, fleet: Settings) -> dict[str, float] | None:
    return None if fleet.closed_loop else asdict(bound(trace, fleet))


def _kept(outcome: Outcome) -> Row:
    return {
        "figures": outcome.to_dict(),
        "decide_seconds": outcome.decide_seconds,
        "ttft": _packed(outcome.ttft),
        "e2e": _packed(outcome.e2e),
    }


def _packed(values: NDArray[np.float64]) -> str:
    return base64.b64encode(values.astype("<f4").tobytes()).decode()
