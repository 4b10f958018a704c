"""The traces of Mooncake: JSON lines with the hashes of 512-token blocks.

Published with "Mooncake: Trading More Storage for Less Computation" (FAST '25) at github.com/kvcache-ai/Mooncake,
`FAST25-release/traces` and `FAST25-release/arxiv-trace`. `timestamp` is in milliseconds. A block's number stands for
its tokens and all before them. The files have no sessions.
"""

from __future__ import annotations

from preble.sim.traces.assembly import Record, check_cover, numbered_trace
from preble.sim.traces.fields import MISSING, integer, integers, json_object, seconds
from preble.sim.traces.file_trace import FileTrace
from preble.sim.traces.lines import Lines
from preble.sim.traces.trace_format import ReadingOptions, TraceFormat

BLOCK_SIZE = 512


def _read(lines: Lines, _: ReadingOptions) -> FileTrace:
    records = []
    for line in lines:
        row = json_object(lines, line)
        tokens = integer(lines, "input_length", row.get("input_length", MISSING), least=1)
        blocks = integers(lines, "hash_ids", row.get("hash_ids", MISSING))
        check_cover(lines, "hash_ids", blocks, tokens, BLOCK_SIZE)
        records.append(
            Record(
                time=seconds(lines, "timestamp", row.get("timestamp", MISSING), per_second=1000),
                prompt_tokens=tokens,
                output_tokens=integer(lines, "output_length", row.get("output_length", MISSING), least=0),
                blocks=blocks,
            )
        )
    return numbered_trace(lines, FORMAT.name, records, BLOCK_SIZE)


FORMAT = TraceFormat(
    name="mooncake",
    example='{"timestamp": 2750, "input_length": 900, "output_length": 40, "hash_ids": [0, 1]}',
    is_json=True,
    recognises=lambda names: names >= {"timestamp", "input_length", "hash_ids"} and "chat_id" not in names,
    read=_read,
)
