"""In which order a replica's waiting requests are served: orders by name."""

from __future__ import annotations

import difflib

from preble.errors import InvalidRequest
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
    known = ORDERS.get(name) if isinstance(name, str) else None
    if known is None:
        close = difflib.get_close_matches(name, ORDERS, n=1) if isinstance(name, str) else []
        hint = f"; did you mean {close[0]!r}?" if close else ""
        raise InvalidRequest(f"local_order must be one of {', '.join(sorted(ORDERS))}, not {name!r}{hint}")
    return known


__all__ = ["ORDERS", "WaitingOrder", "find_order"]
