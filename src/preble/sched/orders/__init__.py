"""In which order a replica's waiting requests are served: orders by name."""

from __future__ import annotations

from preble.sched.by_name import by_name
from preble.sched.orders.base import WaitingOrder
from preble.sched.orders.fcfs import FirstComeFirstServed
from preble.sched.orders.hrrn import HighestResponseRatioNext
from preble.sched.orders.priority_groups import PriorityGroups

ORDERS: dict[str, type[WaitingOrder]] = {
    order.name: order for order in (HighestResponseRatioNext, PriorityGroups, FirstComeFirstServed)
}
"""The orders, by name."""


def find_order(name: str) -> type[WaitingOrder]:
    """The order of this name.

    Raises:
        InvalidRequest: there is none.
    """
    return by_name("local_order", name, ORDERS)


__all__ = ["ORDERS", "WaitingOrder", "find_order"]
