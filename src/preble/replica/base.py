"""What the cluster knows of a replica, whether it runs in a thread or in a process of its own."""

from __future__ import annotations

from typing import Protocol

from preble.engine.messages import Command, Ready, StepReport


class Replica(Protocol):
    """One life of a replica: an engine that is being loaded, runs, and ends. A restart is another object.

    It starts when it is made and tells its listener `ready` once it can serve. All methods may be called from any
    thread, at any time, and all but `join` return at once.
    """

    number: int
    process_id: int | None
    """Of the process that it has to itself, once it has started."""

    def send(self, command: Command) -> None:
        """Tell the engine something before its next step. After the end it is dropped."""
        ...

    def stop(self) -> None:
        """Ask the replica to end after its current step; requests it still has are dropped."""
        ...

    def kill(self) -> None:
        """End the replica at once if that is possible, else as soon as it comes back from what it does."""
        ...

    def join(self, patience: float | None = None) -> None:
        """Block until the replica has ended and everything it held is given back. Where nothing can end it by force,
        it is left behind after `patience` seconds."""
        ...


class Listener(Protocol):
    """Where a replica reports. Called from a thread of the replica's."""

    def ready(self, replica: Replica, ready: Ready) -> None:
        """The engine is loaded."""
        ...

    def reported(self, replica: Replica, report: StepReport) -> None:
        """A step ended."""
        ...

    def failed(self, replica: Replica, cause: BaseException) -> None:
        """The replica could not be loaded, or stopped on an error: its requests and its KV pages are gone, and nothing
        more is reported but `ended`. Never called after `stop` or `kill`."""
        ...

    def ended(self, replica: Replica) -> None:
        """The replica's thread or process is gone, for whatever reason. The last call."""
        ...
