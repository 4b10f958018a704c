"""Text that arrives in pieces, broken between words on a terminal."""

from __future__ import annotations

import os
import re
from typing import IO

from rich.cells import cell_len


class WordWrap:
    """Writes pieces of text as they come. On a terminal a word that would cross the edge moves to a new line, together
    with the part of it that is there already; elsewhere the text stays as it is.

    Args:
        out: where to write.
        column: where the cursor stands.
    """

    def __init__(self, out: IO[str], column: int = 0) -> None:
        self._out = out
        self._column = column
        self._width = _columns(out)
        self._word = ""
        """The part of the last word that has been written."""

    def write(self, text: str) -> None:
        """Write and flush."""
        if self._width:
            text = "".join(self._placed(part) for part in re.findall(r"\s|\S+", text))
        self._out.write(text)
        self._out.flush()

    def _placed(self, part: str) -> str:
        """What to write for a blank or a part of a word, so that it fits."""
        if part.isspace():
            at_edge = part == "\n" or self._column + 1 >= self._width
            self._word, self._column = "", 0 if at_edge else self._column + 1
            return "\n" if at_edge else part
        word = self._word + part
        fits = self._column + cell_len(part) < self._width
        if fits or cell_len(word) >= self._width:  # no line could hold it: the terminal breaks it
            self._word, self._column = word, (self._column + cell_len(part)) % self._width
            return part
        erase = f"\x1b[{cell_len(self._word)}D\x1b[K" if self._word else ""
        self._word, self._column = word, cell_len(word)
        return f"{erase}\n{word}"


def _columns(out: IO[str]) -> int:
    """Width of the terminal behind `out`; 0 if it is none, or says nothing."""
    try:
        return os.get_terminal_size(out.fileno()).columns if out.isatty() else 0
    except OSError:
        return 0
