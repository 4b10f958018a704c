"""A setting: requests, and the fleet that serves them, but for the policy."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from preble.bench.sim.condition import in_condition
from preble.bench.sim.source import Source
from preble.sim.settings import Settings
from preble.sim.trace import Trace


@dataclass(frozen=True, slots=True)
class Setting:
    """One point of a grid. Requests arrive at `load` times a rate: the saturation of this fleet if `rate` is `None`."""

    source: Source
    replicas: int
    cost: str
    load: float
    rate: float | None = None
    """Requests per second that count as a load of 1."""
    condition: str = "plain"
    seed: int = 0

    @property
    def name(self) -> str:
        """The same for all seeds."""
        parts = [self.source.name, f"{self.replicas} x {self.cost}", f"load {self.load:g}"]
        return ", ".join(parts if self.condition == "plain" else [*parts, self.condition])

    def fleet(self, trace: Trace, order: str) -> Settings:
        """The fleet, whose replicas serve what waits in this order.

        Raises:
            InvalidRequest: there is no such cost model, order or condition.
        """
        plain = Settings(replicas=self.replicas, cost=self.cost, order=order, seed=self.seed)
        return in_condition(self.condition, plain, trace)

    def to_dict(self) -> dict[str, Any]:
        """In types that JSON knows."""
        return asdict(self)

    @classmethod
    def from_dict(cls, fields: dict[str, Any]) -> Setting:
        """What `to_dict` gave."""
        return cls(**{**fields, "source": Source(**fields["source"])})
