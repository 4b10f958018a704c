"""A replica's process: `python -m preble.engine.worker --socket FD --parent PID`, as `ProcessReplica` starts it.

The parent says over the inherited socket what to load (`Launch`), then commands; the worker tells `Ready`, a report per
step, and what it logs. It lives as long as its parent wants it and not a moment longer: the end of the stream ends it,
in the middle of a step too, and on Linux the kernel kills it with its parent, even while it is stopped or while some
other process holds the parent's end of the socket open.
"""

from __future__ import annotations

import argparse
import ctypes
import faulthandler
import gc
import logging
import os
import signal
import socket
import sys
import threading
import traceback
from collections.abc import Iterator, Sequence
from queue import SimpleQueue
from typing import NoReturn

from preble.engine.frames import FrameReader, FrameWriter
from preble.engine.messages import Command, Crash, Launch, LogLine, News
from preble.engine.wire import decode_commands, decode_launch, encode_news

_RECEIVED_AT_ONCE = 1 << 18
_LONGEST_TEXT = 1 << 16
"""Characters of a log line or a traceback; what is longer loses its middle."""
_PR_SET_PDEATHSIG = 1


class Parent:
    """The worker's end of the stream. `send` may be called from any thread."""

    def __init__(self, connection: socket.socket) -> None:
        self._connection = connection
        self._writer = FrameWriter()
        self._lock = threading.Lock()
        self._commands: SimpleQueue[list[Command]] = SimpleQueue()

    def payloads(self) -> Iterator[bytes]:
        """What the parent sends, until it ends the stream or is gone."""
        reader = FrameReader()
        while received := self._receive():
            yield from reader.payloads(received)

    def listen(self, payloads: Iterator[bytes]) -> None:
        """Keep commands for `take`, and end the process when the stream ends. In a thread of its own."""
        try:
            for payload in payloads:
                self._commands.put(decode_commands(payload))
        except BaseException as error:
            self.crash(error)
        os._exit(0)

    def take(self, wait: bool) -> list[Command]:
        """The commands that came since the last call; one frame's at least, where it shall wait."""
        commands = self._commands.get() if wait else []
        while not self._commands.empty():
            commands += self._commands.get()
        return commands

    def send(self, message: News) -> None:
        """Tell the parent. Waits while it does not listen."""
        try:
            for payload in encode_news([message]):
                with self._lock:
                    self._connection.sendall(self._writer.frame(payload))
        except OSError:  # it is gone
            os._exit(0)

    def crash(self, error: BaseException) -> NoReturn:
        """Tell the parent of an error, and end the process."""
        kind = type(error)
        named = kind.__qualname__ if kind.__module__ in ("builtins", "preble.errors") else _qualified(kind)
        self.send(Crash(named, _shortened(str(error)), _shortened("".join(traceback.format_exception(error)))))
        os._exit(1)

    def _receive(self) -> bytes:
        try:
            return self._connection.recv(_RECEIVED_AT_ONCE)
        except ConnectionError:  # it died with something of ours unread
            return b""


class LogsToParent(logging.Handler):
    """Sends records to the parent, tracebacks included."""

    def __init__(self, parent: Parent) -> None:
        super().__init__()
        self._parent = parent

    def emit(self, record: logging.LogRecord) -> None:
        try:
            text = self.format(record)
        except Exception:  # a record that does not fit its own format
            self.handleError(record)
            return
        self._parent.send(LogLine(record.name, record.levelno, _shortened(text)))


def main(arguments: Sequence[str] | None = None) -> NoReturn:
    """Be a worker until the end of the process."""
    parser = argparse.ArgumentParser(prog="preble.engine.worker", description="a replica's process; see ProcessReplica")
    parser.add_argument("--socket", type=int, required=True, help="file descriptor of a connected stream socket")
    parser.add_argument("--parent", type=int, required=True, help="process id of whoever holds its other end")
    options = parser.parse_args(arguments)
    # The parent decides what an interrupt means; in a terminal it goes to all processes of its group.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    faulthandler.enable()
    _die_with(options.parent)
    connection = socket.socket(fileno=options.socket)
    connection.set_inheritable(False)
    parent = Parent(connection)
    try:
        payloads = parent.payloads()
        first = next(payloads, None)
        if first is None:
            os._exit(0)
        launch = decode_launch(first)
        threading.Thread(target=parent.listen, args=(payloads,), name="preble-parent", daemon=True).start()
        _log_to(parent, launch.log_level)
        _serve(launch, parent)
    except BaseException as error:
        parent.crash(error)
    os._exit(0)


def _serve(launch: Launch, parent: Parent) -> None:
    """Load the engine and run it."""
    # Seconds of imports, during which the parent can already end the worker.
    import torch

    from preble.engine.service import serve
    from preble.engine.source import EngineSource

    torch.set_num_threads(launch.torch_threads)
    source = EngineSource(launch.model, launch.options, launch.text)
    engine = source.engine(launch.replica, launch.device, sharing=launch.sharing, pages=launch.pages)
    gc.freeze()  # what was loaded stays: a full collection that looks at it stops a step for a tenth of a second
    parent.send(engine.ready())
    serve(engine, parent.take, parent.send)


def _die_with(parent: int) -> None:
    """Have the kernel kill this process when its parent dies."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    if os.getppid() != parent:  # it died before that
        os._exit(0)


def _log_to(parent: Parent, level: int) -> None:
    logger = logging.getLogger("preble")
    logger.setLevel(level)
    logger.propagate = False
    logger.addHandler(LogsToParent(parent))


def _qualified(kind: type[BaseException]) -> str:
    return f"{kind.__module__}.{kind.__qualname__}"


def _shortened(text: str) -> str:
    if len(text) <= _LONGEST_TEXT:
        return text
    return f"{text[: _LONGEST_TEXT // 2]}\n[…]\n{text[-_LONGEST_TEXT // 2 :]}"


if __name__ == "__main__":
    main()
