"""Who takes part: a policy with its switches, and the order in which its replicas serve what waits there."""

from __future__ import annotations

from dataclasses import dataclass

from preble.bench.sim.peers import PEERS
from preble.errors import InvalidRequest
from preble.sched.by_name import by_name
from preble.sched.orders import find_order
from preble.sched.policies import POLICIES, Policy, make_policy

WORDS = {"on": True, "off": False}


@dataclass(frozen=True, slots=True)
class Entry:
    """A policy and an order, as they are written: `e2-paper:rebalancing=off:patience=3@fcfs`."""

    policy: str
    """Its name and its switches, or the name of a peer."""
    order: str

    @classmethod
    def parse(cls, text: str, order: str) -> Entry:
        """From `POLICY[:SWITCH=VALUE…][@ORDER]`; `order` is that of one that names none.

        Raises:
            InvalidRequest: there is no such policy, switch or order.
        """
        policy, _, own = text.partition("@")
        entry = cls(policy, own or order)
        find_order(entry.order)
        if entry.peer is None:
            entry.make()
        return entry

    @property
    def name(self) -> str:
        """As `parse` reads it."""
        return f"{self.policy}@{self.order}"

    @property
    def peer(self) -> str | None:
        """The peer whose own code decides, if it is one."""
        return self.policy if self.policy in PEERS else None

    def make(self) -> Policy:
        """A fresh policy.

        Raises:
            InvalidRequest: there is no such policy, or it has no such switch.
        """
        name, *switches = self.policy.split(":")
        if not switches:
            return make_policy(name)
        values = dict(self._switch(one) for one in switches)
        try:
            return by_name("policy", name, POLICIES)(**values)
        except TypeError as error:
            raise InvalidRequest(f"policy {self.policy!r}: {error}") from None

    def _switch(self, text: str) -> tuple[str, bool | float]:
        name, _, value = text.partition("=")
        try:
            return name, WORDS[value] if value in WORDS else float(value)
        except ValueError:
            raise InvalidRequest(
                f"policy {self.policy!r}: a switch is NAME=on, NAME=off or NAME=NUMBER, not {text!r}"
            ) from None
