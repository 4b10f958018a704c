"""The operating system's side of a replica in a process: how it is started, what it prints, how it ended."""

from __future__ import annotations

import codecs
import logging
import os
import signal
import socket
import subprocess
import sys
import sysconfig
from collections import deque
from pathlib import Path
from types import TracebackType
from typing import Self

import preble

logger = logging.getLogger("preble.worker")

LONGEST_LINE = 2000
"""Characters; a longer line is logged in pieces."""
LAST_LINES = 10
"""How many lines of output an error quotes."""
_READ_AT_ONCE = 1 << 16
_DRAINED_AT_MOST = 1 << 20
"""Bytes of output that are read after the end: some child of the worker's may go on to write."""


class WorkerProcess:
    """A child process with a socket to it. Belongs to the thread that made it: the child dies with that thread.

    Raises:
        OSError: it cannot be started.
    """

    def __init__(self, module: str, number: int) -> None:
        self._number = number
        self._text = codecs.getincrementaldecoder("utf-8")("replace")
        self._line = ""
        self._last: deque[str] = deque(maxlen=LAST_LINES)
        self.connection, theirs = socket.socketpair()
        try:
            self.connection.setblocking(False)
            self._process = subprocess.Popen(
                [
                    *(sys.executable, "-P", "-u", "-m", module),
                    *("--socket", str(theirs.fileno()), "--parent", str(os.getpid())),
                ],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                bufsize=0,
                pass_fds=[theirs.fileno()],
                process_group=0,  # what interrupts the parent in its terminal does not interrupt the worker
                env=_environment(),
            )
        except BaseException:
            self.connection.close()
            raise
        finally:
            theirs.close()
        assert self._process.stdout is not None
        self._output = self._process.stdout
        os.set_blocking(self.output, False)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.kill()
        self.wait(0.0)
        self.connection.close()
        self._output.close()

    @property
    def pid(self) -> int:
        return self._process.pid

    @property
    def output(self) -> int:
        """File descriptor of what the worker prints on stdout and stderr."""
        return self._output.fileno()

    def read_output(self) -> int:
        """Log the lines that the worker printed; how many bytes there were to read."""
        try:
            data = os.read(self.output, _READ_AT_ONCE)
        except BlockingIOError:
            return 0
        self._log(self._text.decode(data))
        return len(data)

    def kill(self) -> None:
        """End it at once."""
        self._process.kill()

    def wait(self, patience: float) -> None:
        """Wait until it ended; after `patience` seconds, kill it."""
        try:
            self._process.wait(patience)
        except subprocess.TimeoutExpired:
            self.kill()
            self._process.wait()
        left = _DRAINED_AT_MOST
        while left > 0 and (count := self.read_output()):
            left -= count
        self._log(self._text.decode(b"", final=True) + "\n")

    def how_it_ended(self) -> str:
        """In words, with what it printed last."""
        code = self._process.returncode
        if code >= 0:
            ended = f"exited with code {code}"
        else:
            try:
                ended = f"was killed by {signal.Signals(-code).name}"
            except ValueError:
                ended = f"was killed by signal {-code}"
        quoted = "".join(f"\n    {line}" for line in self._last)
        return f"its process {self.pid} {ended}" + (f"; it printed last:{quoted}" if quoted else "")

    def _log(self, text: str) -> None:
        """Log the whole lines in `text` and what came before it; keep the rest, unless that is too long already."""
        *lines, self._line = (self._line + text).split("\n")
        if len(self._line) >= LONGEST_LINE:
            lines.append(self._line)
            self._line = ""
        for line in lines:
            for start in range(0, len(line.rstrip()), LONGEST_LINE):
                piece = line[start : start + LONGEST_LINE].rstrip()
                self._last.append(piece)
                logger.warning("replica %d: %s", self._number, piece)


def _environment() -> dict[str, str]:
    """The parent's, and where this package lies if the worker would not find it by itself."""
    environment = dict(os.environ)
    root = Path(preble.__file__).parent.parent
    if str(root) not in {sysconfig.get_path(name) for name in ("purelib", "platlib")}:
        inherited = environment.get("PYTHONPATH")
        environment["PYTHONPATH"] = f"{root}{os.pathsep}{inherited}" if inherited else str(root)
    return environment
