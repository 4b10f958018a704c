"""A replica in a thread of this process: the default on the CPU."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable

import torch

from preble.engine.engine import Engine
from preble.engine.messages import Command
from preble.engine.service import serve
from preble.errors import PrebleError
from preble.replica.base import Listener

logger = logging.getLogger("preble.replica")

PATIENCE = 5.0
"""Seconds that `join` waits for a thread that was killed, and at least for any: nothing can end it, and it may hang for
good."""


class ThreadReplica:
    """Makes an engine and owns the thread that steps it. Commands are taken in between two steps, all at once."""

    def __init__(
        self, number: int, make_engine: Callable[[], Engine], listener: Listener, *, torch_threads: int
    ) -> None:
        self.number = number
        self.process_id: int | None = None
        self._engine: Engine | None = None
        self._make_engine = make_engine
        self._listener = listener
        self._torch_threads = torch_threads
        self._wake = threading.Condition()
        self._inbox: list[Command] = []
        self._stopping = False
        self._killed = False
        self._parked = False
        self._thread = threading.Thread(target=self._run, name=f"preble-replica-{number}", daemon=True)
        self._thread.start()

    @property
    def idle(self) -> bool:
        """Whether the replica took in every command and has nothing left to compute."""
        with self._wake:
            return self._parked and not self._inbox

    def send(self, command: Command) -> None:
        """Tell the engine something before its next step."""
        with self._wake:
            if not self._stopping:
                self._inbox.append(command)
                self._wake.notify()

    def stop(self) -> None:
        """End after the current step."""
        with self._wake:
            self._stopping = True
            self._inbox.clear()
            self._wake.notify()

    def kill(self) -> None:
        """As `stop`: a thread cannot be ended from outside."""
        self._killed = True
        self.stop()

    def join(self, patience: float | None = None) -> None:
        """Wait for the end; for `patience` seconds at most, and not for long where the thread is known to hang."""
        if self._killed:
            patience = PATIENCE
        self._thread.join(None if patience is None else max(patience, PATIENCE))
        if self._thread.is_alive():
            logger.error("replica %d hangs in a thread, which is left behind", self.number)

    def _take(self, wait: bool) -> list[Command] | None:
        with self._wake:
            while wait and not (self._inbox or self._stopping):
                self._parked = True
                self._wake.wait()
            self._parked = False
            if self._stopping:
                return None
            commands, self._inbox = self._inbox, []
            return commands

    def _run(self) -> None:
        try:
            # A setting of this thread only: replicas share the cores instead of each using all of them.
            torch.set_num_threads(self._torch_threads)
            engine = self._engine = self._make_engine()
            self._listener.ready(self, engine.ready())
            serve(engine, self._take, lambda report: self._listener.reported(self, report))
        except BaseException as error:
            if not self._stopping:
                if not isinstance(error, PrebleError):  # which says all, and is raised or logged by the cluster
                    logger.exception("replica %d stopped on an error", self.number)
                self.stop()
                self._listener.failed(self, error)
        finally:
            # Its KV pages are given back before a successor asks for as many.
            self._engine = engine = None  # type: ignore[assignment]
            self._listener.ended(self)
