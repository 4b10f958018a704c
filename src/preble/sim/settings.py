"""What a simulation pretends: the replicas, and what goes wrong."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

from preble.errors import InvalidRequest
from preble.sched.cost import CostModel
from preble.sched.cost_presets import make_cost

KV_TOKENS = {
    "mistral-7b-a6000": 198_516,
    "mistral-7b-a100": 440_000,
    "llama-3-70b-2xa100": 100_000,
    "llama-3-70b-2xh100": 100_000,
    "generic": 400_000,
}
"""Tokens that the KV pages of one replica hold where nobody says otherwise. The first is what the paper's authors used.
The second is what 80 GB leave beside the weights, at 128 KiB a token. Beside 141 GB of 16-bit weights, 2 x 80 GB leave
room for a few tens of thousands; the 100,000 assume 8-bit KV."""
OTHER_KV_TOKENS = 200_000
"""… of a replica whose cost model is not among these."""


@dataclass(frozen=True, slots=True)
class Failure:
    """A replica that loses its pages and its requests."""

    replica: int
    """Its number, from 0."""
    at: float
    """Seconds since the start."""
    seconds: float = float("inf")
    """… until it is back, with an empty cache."""

    @classmethod
    def parse(cls, text: str) -> Failure:
        """From `REPLICA@SECONDS`, or `REPLICA@SECONDS+SECONDS` for one that comes back.

        Raises:
            InvalidRequest: it is written otherwise.
        """
        found = re.fullmatch(r"(\d+)@(\d+(?:\.\d+)?)(?:\+(\d+(?:\.\d+)?))?", text)
        if found is None:
            raise InvalidRequest(
                f"a failure is REPLICA@SECONDS or REPLICA@SECONDS+SECONDS, as in 1@60+20, not {text!r}"
            )
        replica, at, seconds = found.groups()
        return cls(int(replica), float(at), float(seconds) if seconds else float("inf"))


@dataclass(frozen=True, slots=True)
class Settings:
    """One fleet and its ways. Everything but the trace and the policy.

    Raises:
        InvalidRequest: a value is out of its range, or there is no such cost model.
    """

    replicas: int = 4
    """How many, numbered from 0."""
    cost: str | CostModel = "generic"
    """What steps take: a preset of `preble.sched.PRESETS`, or a model."""
    believed_cost: str | CostModel | None = None
    """What the schedulers think at first that steps take, if that is not the truth."""
    capacity_tokens: int | None = None
    """Tokens that the KV pages of a replica hold; by default as `KV_TOKENS` says for the cost model."""
    page_size: int = 64
    """Tokens in a page; whole pages are shared."""
    max_batched_tokens: int = 2048
    """Tokens that one step computes at most."""
    max_running: int = 256
    """Requests that one step works on at most."""
    order: str = "hrrn"
    """Of the requests that wait at a replica (`preble.sched.orders`)."""
    closed_loop: bool = False
    """A session's next request is sent its think time after the one before has ended, not at its time in the trace."""
    event_delay: float = 0.0
    """Seconds until the global scheduler hears what happened at a replica."""
    failures: tuple[Failure, ...] = ()
    """Replicas that are lost."""
    slowness: tuple[float, ...] = ()
    """Per replica, from the first on: its steps take so many times as long; 1 for those not named."""
    max_tokens: int = 4096
    """What requests say that they generate at most, if their answer is not longer."""
    leap_seconds: float = 0.2
    """Runs of steps that only decode are reported at least so often; 0 reports each."""
    seed: int = 0
    """Of the lots drawn between replicas that are equal."""

    def __post_init__(self) -> None:
        positive = {
            name: getattr(self, name)
            for name in ("replicas", "page_size", "max_batched_tokens", "max_running", "max_tokens")
        }
        if self.capacity_tokens is not None:
            positive["capacity_tokens"] = self.capacity_tokens
        for model in (self.cost, self.believed_cost):
            if model is not None:
                make_cost(model)
        for name, value in positive.items():
            if value < 1:
                raise InvalidRequest(f"{name} must be at least 1, not {value}")
        for name in ("event_delay", "leap_seconds"):
            if not 0 <= getattr(self, name) < float("inf"):
                raise InvalidRequest(f"{name} must be at least 0 seconds and finite, not {getattr(self, name)}")
        for failure in self.failures:
            if not 0 <= failure.replica < self.replicas:
                raise InvalidRequest(
                    f"there is no replica {failure.replica} to fail; there are {self.replicas}, from 0"
                )
            if not (0 <= failure.at < float("inf") and failure.seconds >= 0):
                raise InvalidRequest(f"a failure is at a time from 0 on, and lasts 0 seconds or more: {failure}")
        if len(self.slowness) > self.replicas or not all(0 < one < float("inf") for one in self.slowness):
            raise InvalidRequest(
                f"slowness must be a positive number for each of {self.replicas} replicas at most: {self.slowness}"
            )
        if self.kv_tokens < self.page_size:
            raise InvalidRequest(f"capacity_tokens={self.kv_tokens} is less than a page of {self.page_size} tokens")

    @property
    def cost_model(self) -> CostModel:
        """What steps take.

        Raises:
            InvalidRequest: there is no such preset.
        """
        return make_cost(self.cost)

    @property
    def kv_tokens(self) -> int:
        """Tokens that the KV pages of a replica hold."""
        return self.capacity_tokens or KV_TOKENS.get(self.cost_model.name, OTHER_KV_TOKENS)

    def to_dict(self) -> dict[str, Any]:
        """In types that JSON knows."""
        believed = None if self.believed_cost is None else make_cost(self.believed_cost).name
        return {
            "replicas": self.replicas,
            "cost": self.cost_model.name,
            "believed_cost": believed,
            "capacity_tokens": self.kv_tokens,
            "page_size": self.page_size,
            "max_batched_tokens": self.max_batched_tokens,
            "max_running": self.max_running,
            "order": self.order,
            "closed_loop": self.closed_loop,
            "event_delay": self.event_delay,
            "failures": [
                {"replica": one.replica, "at": one.at, "seconds": one.seconds if one.seconds < float("inf") else None}
                for one in self.failures
            ],
            "slowness": list(self.slowness),
            "max_tokens": self.max_tokens,
            "leap_seconds": self.leap_seconds,
            "seed": self.seed,
        }
