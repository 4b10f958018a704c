"""What an order of waiting requests has to provide."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Set
from typing import ClassVar

from preble.sched.cost import CostModel
from preble.sched.sequence import Sequence


class WaitingOrder(ABC):
    """Ranks the waiting requests of one priority class on one replica; `WaitingQueue` keeps the classes.

    It reads `Sequence.serial`, `arrived`, `length` and `matched`. Whatever it prefers, the queue gives one of every
    `oldest_every` turns to the oldest request, so none starves: with m older ones waiting when it comes, a request is
    among the next `oldest_every` x (m + 1) admissions of its class. `WaitingQueue` says what exactly is counted.

    Args:
        cost: what prefills cost on this replica.
    """

    name: ClassVar[str]
    oldest_every: ClassVar[int]

    def __init__(self, cost: CostModel) -> None:
        self.cost = cost

    @abstractmethod
    def add(self, sequence: Sequence) -> None:
        """A request waits."""

    @abstractmethod
    def remove(self, sequence: Sequence) -> None:
        """It does no more."""

    @abstractmethod
    def update(self, sequence: Sequence) -> None:
        """A waiting request's `matched` may have changed."""

    @abstractmethod
    def next(self, now: float, passing: Set[Sequence]) -> Sequence | None:
        """Who is to be served now, were those in `passing` not there; changes nothing. `None` if nobody is left."""

    def served(self, sequence: Sequence) -> None:  # noqa: B027  # most orders keep no score
        """What `next` returned is being admitted, as its turn; `remove` follows."""

    @abstractmethod
    def check(self, waiting: list[Sequence]) -> None:
        """Prove that the order knows just these requests, with their present `matched`; `AssertionError` if not."""
