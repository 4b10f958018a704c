"""From the lines of any format to a trace: order of arrival, and block numbers that only equal blocks share."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from preble.errors import InvalidRequest
from preble.sim.trace import Blocks, TracedRequest
from preble.sim.traces.file_trace import FileTrace
from preble.sim.traces.lines import Lines


@dataclass(slots=True)
class Record:
    """One request as its line has it."""

    time: float
    """Seconds; only differences count."""
    prompt_tokens: int
    output_tokens: int
    """At least 0."""
    blocks: NDArray[np.int64] | None = None
    """int64 [ceil(prompt_tokens / block size)], any numbers; `None` where nothing is known of what prompts share."""
    session: str | None = None
    think: float = 0.0


def numbered_trace(lines: Lines, format: str, records: list[Record], block_size: int) -> FileTrace:
    """A trace of records with block numbers. They are renumbered from 0 in order of first use.

    A partial last block and a full one never get the same number, even where the file has it: one of them holds tokens
    that the other does not. Nor do two partial ones of prompts of different length.
    """
    _sort(records)
    return _trace(lines, format, records, _number(records, block_size), block_size)


def separate_trace(lines: Lines, format: str, records: list[Record], left_out: int = 0) -> FileTrace:
    """A trace of records that share nothing as far as the file tells: each prompt is one block of its own."""
    _sort(records)
    blocks = np.arange(len(records), dtype=np.int32).reshape(-1, 1)
    longest = max((one.prompt_tokens for one in records), default=1)
    return _trace(lines, format, records, list(blocks), longest, left_out)


def token_trace(lines: Lines, format: str, records: list[Record]) -> FileTrace:
    """A trace of records whose blocks are token ids, which fit in int32 and are kept."""
    _sort(records)
    blocks = [one.blocks.astype(np.int32) for one in records if one.blocks is not None]
    return _trace(lines, format, records, blocks, 1)


def check_cover(lines: Lines, name: str, blocks: NDArray[np.int64], prompt_tokens: int, block_size: int) -> None:
    """Raise InvalidRequest unless there are just as many blocks as the prompt takes."""
    expected = -(-prompt_tokens // block_size)
    if len(blocks) != expected:
        raise lines.error(
            f"{name} has {len(blocks)} numbers, but {prompt_tokens} prompt tokens are {expected} blocks of {block_size}"
        )


def _sort(records: list[Record]) -> None:
    records.sort(key=lambda one: one.time)


def _number(records: Sequence[Record], block_size: int) -> list[Blocks]:
    given = [one.blocks for one in records if one.blocks is not None]
    if not given:
        return []
    ends = np.cumsum([len(blocks) for blocks in given])
    tokens = np.array([one.prompt_tokens for one in records])
    values, codes = np.unique(np.concatenate(given), return_inverse=True)
    # A partial block is told apart by its prompt's length too, which says where it stands and how far it is filled.
    partial = tokens % block_size != 0
    last = ends[partial] - 1
    pairs = np.stack((codes[last], tokens[partial]), axis=1)
    codes[last] = len(values) + np.unique(pairs, axis=0, return_inverse=True)[1].reshape(-1)
    _, first_use, dense = np.unique(codes, return_index=True, return_inverse=True)
    rank = np.empty(len(first_use), dtype=np.int32)
    rank[np.argsort(first_use)] = np.arange(len(first_use), dtype=np.int32)
    numbers = rank[dense]
    return [numbers[end - len(blocks) : end] for end, blocks in zip(ends, given, strict=True)]


def _trace(
    lines: Lines,
    format: str,
    records: Sequence[Record],
    blocks: Sequence[Blocks],
    block_size: int,
    left_out: int = 0,
) -> FileTrace:
    if not records:
        failed = f": all {left_out} of its requests failed" if left_out else ""
        raise InvalidRequest(f"{lines.path} has no request that could be replayed{failed}")
    began = records[0].time
    requests = tuple(
        TracedRequest(
            arrival=one.time - began,
            prompt_tokens=one.prompt_tokens,
            output_tokens=max(one.output_tokens, 1),
            blocks=numbers,
            session=one.session,
            think=one.think,
        )
        for one, numbers in zip(records, blocks, strict=True)
    )
    return FileTrace(
        name=lines.path.name.removesuffix(".gz").rpartition(".")[0] or lines.path.name,
        block_size=block_size,
        requests=requests,
        format=format,
        left_out=left_out,
        without_output=sum(one.output_tokens == 0 for one in records),
    )
