"""Reads a trace from a file of any known format."""

from __future__ import annotations

import csv
import os
import reprlib
from collections.abc import Mapping
from types import MappingProxyType

from preble.errors import InvalidRequest
from preble.sim.traces import azure, bailian, blocks, burstgpt, mooncake, prompts
from preble.sim.traces.fields import json_object
from preble.sim.traces.file_trace import FileTrace
from preble.sim.traces.lines import Lines, open_lines
from preble.sim.traces.trace_format import ReadingOptions, Tokenize, TraceFormat

FORMATS: Mapping[str, TraceFormat] = MappingProxyType(
    {module.FORMAT.name: module.FORMAT for module in (mooncake, bailian, azure, burstgpt, blocks, prompts)}
)
"""Every known format by name."""


def read_trace(
    path: str | os.PathLike[str],
    *,
    format: str | None = None,
    seed: int = 0,
    tokenize: Tokenize | None = None,
    progress: bool = False,
) -> FileTrace:
    """Read a trace from a file, compressed by gzip or not.

    Requests are sorted by arrival, those of equal times in the order of the file, and the first arrives at 0. Blank
    lines are skipped. Block numbers are renumbered, except for token ids; where a format does not tell what prompts
    share, they share nothing: each is one block of its own, and a block is as long as the longest prompt.

    Args:
        path: The file.
        format: A name in `FORMATS`. Without one it is recognised by the file's first line.
        seed: Draws the arrivals of `prompts` without times, a Poisson process of 1 request per second.
        tokenize: Gives the token ids of a text in `prompts`. Without it, they are the bytes of its UTF-8.
        progress: Draw on a terminal how much of the file has been read.

    Raises:
        InvalidRequest: The file cannot be read, has no request, is of no known format, or a line of it is malformed;
            the message names the line.
    """
    if format is not None and format not in FORMATS:
        raise InvalidRequest(f"no trace format is called {format!r}, expected one of {', '.join(FORMATS)}")
    with open_lines(path, progress=progress) as lines:
        first = lines.first()
        chosen = FORMATS[format] if format is not None else _recognised(lines, first)
        return chosen.read(lines, ReadingOptions(seed, tokenize))


def _recognised(lines: Lines, first: str) -> TraceFormat:
    is_json = first.lstrip().startswith("{")
    names = frozenset(json_object(lines, first)) if is_json else _columns(first)
    for one in FORMATS.values():
        if one.is_json == is_json and one.recognises(names):
            return one
    known = "\n".join(f"  {one.name}: {one.example}" for one in FORMATS.values())
    raise lines.error(f"{reprlib.repr(first.strip())} begins no trace format known here. They begin like\n{known}")


def _columns(first: str) -> frozenset[str]:
    try:
        return frozenset(name.strip() for name in next(csv.reader([first])))
    except csv.Error:
        return frozenset()
