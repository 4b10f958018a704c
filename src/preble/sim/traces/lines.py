"""The lines of a trace file, and errors that name them."""

from __future__ import annotations

import gzip
import io
import os
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

from preble.errors import InvalidRequest
from preble.progress import Advance, progress_bar

GZIP_MAGIC = b"\x1f\x8b"
LINES_PER_REPORT = 256
"""Progress is reported once in so many lines, as a report costs more than a short line."""


class Lines:
    """Iterates over the lines that are not blank, decoded, each with its newline."""

    number: int
    """The line given last, counted from 1; 0 before the first."""

    def __init__(self, path: Path, file: BinaryIO, raw: BinaryIO, advance: Advance | None) -> None:
        self.path = path
        self.number = 0
        self._file = file
        self._raw = raw
        self._advance = advance
        self._reported = 0
        self._held: str | None = None

    def __iter__(self) -> Iterator[str]:
        return self

    def __next__(self) -> str:
        if self._held is not None:
            text, self._held = self._held, None
            return text
        while line := self._readline():
            self.number += 1
            if self._advance is not None and self.number % LINES_PER_REPORT == 0:
                self._report(self._advance)
            try:
                text = line.decode("utf-8-sig" if self.number == 1 else "utf-8")
            except UnicodeDecodeError:
                raise self.error("this is not text in UTF-8, expected JSON lines or CSV") from None
            if text.strip():
                return text
        if self._advance is not None:
            self._report(self._advance)
        raise StopIteration

    def first(self) -> str:
        """The first line that is not blank; iterating gives it again.

        Raises:
            InvalidRequest: There is none.
        """
        text = next(self, None)
        if text is None:
            raise InvalidRequest(f"{self.path} is empty: a trace needs at least one request")
        self._held = text
        return text

    def error(self, what: str, line: int | None = None) -> InvalidRequest:
        """An error about a line, by default the one given last."""
        return InvalidRequest(f"{self.path}, line {self.number if line is None else line}: {what}")

    def _readline(self) -> bytes:
        try:
            return self._file.readline()
        except (OSError, EOFError, zlib.error) as error:
            raise InvalidRequest(f"{self.path} cannot be read past line {self.number}: {error}") from error

    def _report(self, advance: Advance) -> None:
        position = self._raw.tell()
        advance(position - self._reported)
        self._reported = position


@contextmanager
def open_lines(path: str | os.PathLike[str], *, progress: bool) -> Iterator[Lines]:
    """Open a text file, compressed by gzip or not.

    Args:
        path: The file.
        progress: Draw on a terminal how much of it has been read.

    Raises:
        InvalidRequest: It cannot be opened.
    """
    where = Path(path)
    try:
        raw = where.open("rb")
    except (OSError, ValueError) as error:
        raise InvalidRequest(f"{where} cannot be read: {getattr(error, 'strerror', None) or error}") from error
    with raw:
        size = os.fstat(raw.fileno()).st_size if raw.seekable() else 0
        compressed = where.suffix == ".gz" or raw.peek(2)[:2] == GZIP_MAGIC
        file: BinaryIO = io.BufferedReader(gzip.GzipFile(fileobj=raw)) if compressed else raw
        with progress_bar(size, shown=progress and size > 0, label=where.name, in_bytes=True) as advance:
            yield Lines(where, file, raw, advance if progress and size > 0 else None)
