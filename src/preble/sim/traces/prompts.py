"""Anyone's own prompts: JSON lines with a text or with token ids.

A line has `text` (or `prompt`), or `tokens`, the ids. Optional: `t` (or `timestamp`), seconds, on every line or on
none; `output_tokens`, 128 without it; `session`. Without times, requests arrive in a Poisson process of 1 per second.
Texts are split by the tokenizer given to the reader; without one, a text's tokens are the bytes of its UTF-8, which
shows what prompts share as well, but counts about four times as many tokens in English. Think times are 0.
"""

from __future__ import annotations

import reprlib

import numpy as np
from numpy.typing import NDArray

from preble.sim.traces.assembly import Record, token_trace
from preble.sim.traces.fields import MISSING, integer, integers, json_object, label, seconds
from preble.sim.traces.file_trace import FileTrace
from preble.sim.traces.lines import Lines
from preble.sim.traces.trace_format import ReadingOptions, Tokenize, TraceFormat

CONTENT = ("text", "prompt", "tokens")
TIME = ("t", "timestamp")
OUTPUT_TOKENS = 128
"""Where the file does not say how many tokens a request generates."""
ARRIVALS_PER_SECOND = 1.0
"""Where the file does not say when requests arrive."""


def _read(lines: Lines, options: ReadingOptions) -> FileTrace:
    records: list[Record] = []
    timed: bool | None = None
    content: str | None = None
    for line in lines:
        row = json_object(lines, line)
        name = _one_of(lines, row, CONTENT)
        if name is None:
            raise lines.error("there is no prompt, expected text or tokens")
        # Ids and bytes are numbers of different things: equal ones would look like a shared prefix.
        if options.tokenize is None and (name == "tokens") != ((content or name) == "tokens"):
            raise lines.error(f"it has {name}, the lines before have {content}: to mix them takes a tokenizer")
        content = name
        when = _one_of(lines, row, TIME)
        if timed not in (None, when is not None):
            raise lines.error("either every line has a time or none: this one differs from the lines before")
        timed = when is not None
        tokens = _tokens(lines, name, row[name], options.tokenize)
        records.append(
            Record(
                time=0.0 if when is None else seconds(lines, when, row[when]),
                prompt_tokens=len(tokens),
                output_tokens=integer(lines, "output_tokens", row.get("output_tokens", OUTPUT_TOKENS), least=0),
                blocks=tokens,
                session=label(lines, "session", row.get("session", MISSING)),
            )
        )
    if not timed:
        gaps = np.random.default_rng(options.seed).exponential(1 / ARRIVALS_PER_SECOND, len(records))
        for record, time in zip(records, np.cumsum(gaps).tolist(), strict=True):
            record.time = time
    return token_trace(lines, FORMAT.name, records)


def _one_of(lines: Lines, row: dict[str, object], names: tuple[str, ...]) -> str | None:
    """The one of these keys that a line has."""
    found = [name for name in names if name in row]
    if len(found) > 1:
        raise lines.error(f"it has {' and '.join(found)}, expected one of them")
    return found[0] if found else None


def _tokens(lines: Lines, name: str, value: object, tokenize: Tokenize | None) -> NDArray[np.int64]:
    """int64 [prompt tokens]: ids that fit in int32."""
    ids: NDArray[np.int64]
    if name == "tokens":
        ids = integers(lines, name, value)
    elif not isinstance(value, str):
        raise lines.error(f"{name} is a {type(value).__name__}, expected a string")
    elif tokenize is not None:
        given = np.asarray(tokenize(value))
        if given.ndim != 1 or (len(given) and given.dtype.kind not in "iu"):
            raise lines.error(f"the tokenizer gave {reprlib.repr(given)}, expected a list of token ids")
        ids = given.astype(np.int64)
    else:
        try:
            ids = np.frombuffer(value.encode(), dtype=np.uint8).astype(np.int64)
        except UnicodeEncodeError:
            raise lines.error(f"{name} has half of a surrogate pair, which is no text") from None
    if not len(ids):
        raise lines.error(f"{name} is empty, expected at least one token")
    if ids.min() < 0 or ids.max() > np.iinfo(np.int32).max:
        wrong = ids.min() if ids.min() < 0 else ids.max()
        raise lines.error(f"token id {wrong} in {name} is out of range, expected 0 to 2147483647")
    return ids


FORMAT = TraceFormat(
    name="prompts",
    example='{"text": "Once upon a time", "t": 2.75, "output_tokens": 40, "session": "a"} or {"tokens": [17, 4, 256]}',
    is_json=True,
    recognises=lambda names: not names.isdisjoint(CONTENT),
    read=_read,
)
