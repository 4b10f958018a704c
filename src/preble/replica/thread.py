"""A replica in a thread of this process: the default on the CPU."""

from __future__ import annotations

import logging
import threading

import torch

from preble.engine.engine import Engine
from preble.engine.messages import Abort, Command, Submit
from preble.replica.base import Listener

logger = logging.getLogger("preble.replica")


class ThreadReplica:
    """Owns an engine and the thread that steps it. Commands are taken in between two steps, all at once."""

    def __init__(self, engine: Engine, listener: Listener, *, number: int, torch_threads: int) -> None:
        self.number = number
        self._engine = engine
        self._listener = listener
        self._torch_threads = torch_threads
        self._wake = threading.Condition()
        self._inbox: list[Command] = []
        self._stopping = False
        self._parked = False
        self._thread = threading.Thread(target=self._run, name=f"preble-replica-{number}", daemon=True)
        self._thread.start()

    @property
    def idle(self) -> bool:
        """Whether the replica took in every command and has nothing left to compute."""
        with self._wake:
            return self._parked and not self._inbox

    def submit(self, request: Submit) -> None:
        self._send(request)

    def abort(self, request_id: str) -> None:
        self._send(Abort(request_id))

    def stop(self) -> None:
        with self._wake:
            self._stopping = True
            self._wake.notify()

    def join(self) -> None:
        self._thread.join()

    def _send(self, command: Command) -> None:
        with self._wake:
            self._inbox.append(command)
            self._wake.notify()

    def _run(self) -> None:
        engine = self._engine
        try:
            # A setting of this thread only: replicas share the cores instead of each using all of them.
            torch.set_num_threads(self._torch_threads)
            with torch.inference_mode():
                while True:
                    with self._wake:
                        while not (self._inbox or self._stopping or engine.has_work):
                            self._parked = True
                            self._wake.wait()
                        self._parked = False
                        if self._stopping:
                            return
                        inbox, self._inbox = self._inbox, []
                    for command in inbox:
                        if isinstance(command, Submit):
                            engine.submit(command)
                        else:
                            engine.abort(command.request_id)
                    self._listener.reported(engine.step())
        except BaseException as error:
            logger.exception("replica %d stopped on an error", self.number)
            self._listener.crashed(self.number, error)
