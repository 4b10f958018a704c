"""What the cluster knows of a replica, whether it runs in a thread or in a process of its own."""

from __future__ import annotations

from typing import Protocol

from preble.engine.messages import StepReport, Submit


class Replica(Protocol):
    """A running engine. `submit` and `abort` may be called from any thread and never block."""

    number: int

    def submit(self, request: Submit) -> None:
        """Queue a request for the next step."""
        ...

    def abort(self, request_id: str) -> None:
        """End a request before the next step."""
        ...

    def stop(self) -> None:
        """Ask the replica to end after its current step; requests it still has are dropped."""
        ...

    def join(self) -> None:
        """Block until the replica has ended."""
        ...


class Listener(Protocol):
    """Where a replica reports. Called from the replica's own thread."""

    def reported(self, report: StepReport) -> None:
        """A step ended."""
        ...

    def crashed(self, replica: int, cause: BaseException) -> None:
        """The replica ended on an error; its requests and its KV pages are gone."""
        ...
