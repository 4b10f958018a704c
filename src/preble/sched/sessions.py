"""Which replica got the last request of each session."""

from __future__ import annotations

from collections import OrderedDict

from preble.sched.invariants import require
from preble.sched.ledger import Ledger

Session = tuple[str, str]
"""A namespace and the caller's name for the session."""


class Sessions:
    """Remembers sessions for the window H after their last placement.

    Args:
        window: seconds.
    """

    def __init__(self, window: float) -> None:
        self._window = window
        self._last: OrderedDict[Session, tuple[float, Ledger]] = OrderedDict()

    def last(self, session: Session, now: float) -> Ledger | None:
        """The replica of its last request, if that was within the window."""
        entry = self._last.get(session)
        return None if entry is None or entry[0] < now - self._window else entry[1]

    def placed(self, session: Session, ledger: Ledger, now: float) -> None:
        """A request of the session went to this replica."""
        before = self._last.pop(session, None)
        if before is not None:
            del before[1].sessions[session]
        self._last[session] = (now, ledger)
        ledger.sessions[session] = None

    def forget(self, ledger: Ledger) -> None:
        """The replica lost what it had."""
        for session in ledger.sessions:
            del self._last[session]
        ledger.sessions.clear()

    def sweep(self, now: float) -> None:
        """Forget at most two outdated sessions: more than `placed` adds in the meantime."""
        for _ in range(2):
            session, (placed, ledger) = next(iter(self._last.items()), (None, (now, None)))
            if session is None or ledger is None or placed >= now - self._window:
                return
            del self._last[session], ledger.sessions[session]

    def check(self, ledgers: list[Ledger]) -> None:
        """Prove that both sides agree."""
        kept = {(session, ledger.replica) for ledger in ledgers for session in ledger.sessions}
        known = {(session, ledger.replica) for session, (_, ledger) in self._last.items()}
        require(kept == known, "sessions and their replicas do not match")
        times = [placed for placed, _ in self._last.values()]
        require(times == sorted(times), "sessions are out of order")
