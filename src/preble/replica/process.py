"""A replica in a process of its own: the default on GPUs, where it keeps Python's lock to itself."""

from __future__ import annotations

import atexit
import logging
import math
import os
import selectors
import threading
import time
from enum import Enum, auto
from types import TracebackType
from typing import Self

from preble.engine.messages import Command, Crash, Launch, LogLine, News, Ready, StepReport
from preble.errors import CheckpointError, DeviceError, InvalidRequest, PrebleError, UnsupportedModel
from preble.replica.base import Listener
from preble.replica.worker_process import WorkerProcess
from preble.replica.worker_stream import WorkerStream

logger = logging.getLogger("preble.replica")

WORKER_MODULE = "preble.engine.worker"
"""What the process runs, as in `python -m`."""
STOP_PATIENCE = 5.0
"""Seconds that a worker may take to leave once it was asked to; then it is killed."""
EXIT_PATIENCE = 1.0
"""Seconds that it may take to end once its stream has ended; then it is killed."""

_REBUILT = {kind.__name__: kind for kind in (CheckpointError, UnsupportedModel, DeviceError, InvalidRequest)}
"""Errors of loading, which arrive as what they were. Nothing that a worker says makes any other class."""


class _Wish(Enum):
    """What the owner wants of a replica."""

    RUN = auto()
    STOP = auto()
    KILL = auto()


class ProcessReplica:
    """Starts a worker process and speaks with it, in a thread that lives as long as the process.

    That thread alone touches process, socket and pipes; others leave commands and wishes, and wake it. So no method
    but `join` waits for anything, whatever the worker does, and a fork of this process cannot disturb its replicas.

    Args:
        launch: which engine the worker shall be.
        listener: is told of its life, from the replica's thread.
    """

    def __init__(self, launch: Launch, listener: Listener) -> None:
        self.number = launch.replica
        self.process_id: int | None = None
        self._launch = launch
        self._listener = listener
        self._lock = threading.Lock()
        self._commands: list[Command] = []
        self._wish = _Wish.RUN
        self._failed = False
        self._alarm: _Alarm | None = None
        self._thread = threading.Thread(target=self._run, name=f"preble-replica-{self.number}", daemon=True)
        _living.add(self)
        try:
            self._thread.start()
        except BaseException:
            _living.discard(self)
            raise

    def send(self, command: Command) -> None:
        """Tell the engine something before its next step. After the end it is dropped."""
        with self._lock:
            if self._wish is _Wish.RUN and not self._failed:
                self._commands.append(command)
                self._wake()

    def stop(self) -> None:
        """Ask the worker to leave, and report nothing more of it but its end. It is killed where it does not go."""
        self._want(_Wish.STOP)

    def kill(self) -> None:
        """End the process at once, and report nothing more of it but its end."""
        self._want(_Wish.KILL)

    def join(self, patience: float | None = None) -> None:
        """Block until the process is gone, and everything that belonged to it here: it is killed if need be."""
        self._thread.join()

    def _want(self, wish: _Wish) -> None:
        with self._lock:
            if self._wish is not _Wish.KILL:
                self._wish = wish
            self._commands.clear()
            self._wake()

    def _wake(self) -> None:
        """Let the thread look again. The lock is held."""
        if self._alarm is not None:
            self._alarm.ring()

    # In the replica's thread

    def _run(self) -> None:
        try:
            with _Alarm() as alarm, WorkerProcess(WORKER_MODULE, self.number) as worker:
                self.process_id = worker.pid
                with self._lock:
                    self._alarm = alarm
                try:
                    self._converse(worker, alarm)
                    worker.wait(EXIT_PATIENCE)
                    raise RuntimeError(f"replica {self.number}: {worker.how_it_ended()}")
                except Exception as error:
                    # At once: others wait to go on where this one stopped, and the process may take its time to go.
                    self._fail(error)
                finally:
                    with self._lock:
                        self._alarm = None
        except OSError as error:  # there is no process, or there are no file descriptors for it
            self._fail(error)
        finally:
            _living.discard(self)
            self._listener.ended(self)

    def _converse(self, worker: WorkerProcess, alarm: _Alarm) -> None:
        """Carry messages both ways until the worker ends its stream, or was asked to leave and does not.

        Raises the error that ended the worker, and `FrameError` where it does not speak as it should.
        """
        stream = WorkerStream(worker.connection, self._launch)
        deadline = math.inf
        with selectors.DefaultSelector() as selector:
            for source in (worker.connection.fileno(), worker.output, alarm.fileno()):
                selector.register(source, selectors.EVENT_READ)
            while not stream.ended:
                stream.flush()
                wish, commands = self._look(alarm, take=not stream.congested)
                if wish is _Wish.STOP and deadline == math.inf:
                    deadline = time.monotonic() + STOP_PATIENCE
                    stream.close()
                if wish is _Wish.KILL or time.monotonic() >= deadline:
                    worker.kill()
                    return
                stream.send(commands)
                writing = selectors.EVENT_WRITE if stream.congested else 0
                selector.modify(worker.connection, selectors.EVENT_READ | writing)
                timeout = None if deadline == math.inf else max(deadline - time.monotonic(), 0.0)
                ready = {key.fd for key, events in selector.select(timeout) if events & selectors.EVENT_READ}
                if worker.output in ready and not worker.read_output():
                    selector.unregister(worker.output)
                if worker.connection.fileno() in ready:
                    for news in stream.receive():
                        self._tell(news)

    def _look(self, alarm: _Alarm, *, take: bool) -> tuple[_Wish, list[Command]]:
        """What the owner wants, and the commands to send if they are to be taken."""
        with self._lock:
            alarm.silence()
            commands: list[Command] = []
            if take:
                commands, self._commands = self._commands, commands
            return self._wish, commands

    def _tell(self, news: News) -> None:
        """Pass on what the worker said."""
        if isinstance(news, LogLine):
            name = news.logger if news.logger.split(".")[0] == "preble" else "preble.worker"
            logging.getLogger(name).log(news.level, "replica %d: %s", self.number, news.text)
        elif isinstance(news, Crash):
            raise _error_of(news, self.number)
        elif self._wish is not _Wish.RUN:
            return
        elif isinstance(news, Ready):
            self._listener.ready(self, news)
        elif isinstance(news, StepReport):
            self._listener.reported(self, news)

    def _fail(self, error: Exception) -> None:
        """Report the failure, unless the owner asked for an end or knows already."""
        with self._lock:
            if self._wish is not _Wish.RUN or self._failed:
                return
            self._failed = True
            self._commands.clear()
        if not isinstance(error, PrebleError):  # which says all, and is raised or logged by the cluster
            logger.error("replica %d stopped on an error", self.number, exc_info=error)
        self._listener.failed(self, error)


class _Alarm:
    """Wakes a selector from other threads: a pipe that holds one byte at most. Whoever calls holds the same lock."""

    def __init__(self) -> None:
        self._source, self._sink = os.pipe()
        self._ringing = False

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        os.close(self._source)
        os.close(self._sink)

    def fileno(self) -> int:
        return self._source

    def ring(self) -> None:
        if not self._ringing:
            self._ringing = True
            os.write(self._sink, b"\0")

    def silence(self) -> None:
        if self._ringing:
            self._ringing = False
            os.read(self._source, 1)


def _error_of(crash: Crash, number: int) -> Exception:
    """The error that ended a worker, with the worker's traceback as a note."""
    error: Exception
    if crash.kind in _REBUILT:
        error = _REBUILT[crash.kind](crash.text)
    else:
        error = RuntimeError(f"replica {number}: {crash.kind}: {crash.text}")
    error.add_note(f"In the replica's process:\n{crash.traceback}")
    return error


_living: set[ProcessReplica] = set()


@atexit.register
def _end_with_the_interpreter() -> None:
    """Leave no process behind where nobody stopped the replicas."""
    for replica in list(_living):
        replica.kill()
    for replica in list(_living):
        replica._thread.join(STOP_PATIENCE)  # not for ever: a driver may hold on to a process that was killed
