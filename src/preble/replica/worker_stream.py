"""The parent's end of the stream to a worker process."""

from __future__ import annotations

import socket
from collections import deque
from collections.abc import Iterator, Sequence

from preble.engine.frames import FrameReader, FrameWriter
from preble.engine.messages import Command, Launch, News
from preble.engine.wire import decode_news, encode_commands, encode_launch

_RECEIVED_AT_ONCE = 1 << 18


class WorkerStream:
    """Speaks frames over a socket without ever waiting for it.

    Args:
        connection: a connected, non-blocking stream socket; stays the caller's.
        launch: what the worker is told first.
    """

    def __init__(self, connection: socket.socket, launch: Launch) -> None:
        self._connection = connection
        self._writer = FrameWriter()
        self._reader = FrameReader()
        self._outgoing = deque([memoryview(self._writer.frame(encode_launch(launch)))])
        self.ended = False
        """The worker sends nothing more."""

    @property
    def congested(self) -> bool:
        """Whether something waits until the socket takes more."""
        return bool(self._outgoing)

    def send(self, commands: Sequence[Command]) -> None:
        """Send as much as the socket takes now, and the rest with later calls of `flush`."""
        for payload in encode_commands(commands) if commands else ():
            self._outgoing.append(memoryview(self._writer.frame(payload)))
        self.flush()

    def flush(self) -> None:
        """Send what waits, as far as the socket takes it."""
        try:
            while self._outgoing:
                sent = self._connection.send(self._outgoing[0])
                self._outgoing[0] = self._outgoing[0][sent:]
                if not self._outgoing[0]:
                    self._outgoing.popleft()
        except BlockingIOError:
            pass
        except ConnectionError:  # it is gone, but what it said last is still to be read
            self._outgoing.clear()

    def close(self) -> None:
        """Send nothing more, which asks the worker to leave."""
        self._outgoing.clear()
        self._connection.shutdown(socket.SHUT_WR)

    def receive(self) -> Iterator[News]:
        """What there is to read now; to be iterated to the end.

        Raises:
            FrameError: the stream holds something else.
        """
        try:
            received = self._connection.recv(_RECEIVED_AT_ONCE)
        except BlockingIOError:
            return
        except ConnectionError:  # it died with something unread
            received = b""
        self.ended = not received
        for payload in self._reader.payloads(received):
            yield from decode_news(payload)
