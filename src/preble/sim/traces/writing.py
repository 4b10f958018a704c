"""Writes a trace to a file."""

from __future__ import annotations

import gzip
import io
import json
import os
from collections import Counter
from pathlib import Path
from typing import BinaryIO

from preble.errors import InvalidRequest
from preble.sim.trace import Trace


def write_trace(trace: Trace, path: str | os.PathLike[str]) -> None:
    """Write a trace in the `blocks` schema, compressed by gzip where the name ends in `.gz`.

    What is read back has the same requests with the same shared prefixes, sessions and think times; the first arrives
    at 0, and block numbers may differ. The same trace gives the same bytes.

    Raises:
        InvalidRequest: The file cannot be written.
    """
    where = Path(path)
    try:
        with where.open("wb") as raw:
            if where.suffix == ".gz":
                # No name and no time of writing in it: they would make equal traces unequal files.
                with gzip.GzipFile(filename="", mode="wb", fileobj=raw, mtime=0) as packed:
                    _write(trace, packed)
            else:
                _write(trace, raw)
    except OSError as error:
        raise InvalidRequest(f"{where} cannot be written: {error.strerror or error}") from error


def _write(trace: Trace, file: BinaryIO | gzip.GzipFile) -> None:
    turns: Counter[str] = Counter()
    with io.TextIOWrapper(file, encoding="utf-8", newline="\n") as text:
        for request in trace.requests:
            row: dict[str, object] = {
                "t": request.arrival,
                "in": request.prompt_tokens,
                "out": request.output_tokens,
                "block": trace.block_size,
                "blocks": request.blocks.tolist(),
            }
            if request.session is not None:
                row |= {"sid": request.session, "turn": turns[request.session], "think_s": request.think}
                turns[request.session] += 1
            text.write(json.dumps(row, separators=(",", ":")) + "\n")
