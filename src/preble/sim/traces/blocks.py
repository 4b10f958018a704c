"""Preble's own schema: JSON lines with numbers for the blocks of every prompt.

`t` seconds; `in`, `out` tokens; `block` tokens in a block; `blocks` a number for each block of the prompt, of which the
last may be partial. Prompts share as far as their leading numbers are equal. Optional: `sid`, the session, and
`think_s`, the seconds from the end of its request before to this one. Other keys (`turn`, say) are for people. Where no
line has `block` and `blocks`, nothing is known of what prompts share.
"""

from __future__ import annotations

from preble.sim.traces.assembly import Record, check_cover, numbered_trace, separate_trace
from preble.sim.traces.fields import MISSING, integer, integers, json_object, label, seconds
from preble.sim.traces.file_trace import FileTrace
from preble.sim.traces.lines import Lines
from preble.sim.traces.trace_format import ReadingOptions, TraceFormat


def _read(lines: Lines, _: ReadingOptions) -> FileTrace:
    records: list[Record] = []
    block_size: int | None = None
    for line in lines:
        row = json_object(lines, line)
        record = Record(
            time=seconds(lines, "t", row.get("t", MISSING)),
            prompt_tokens=integer(lines, "in", row.get("in", MISSING), least=1),
            output_tokens=integer(lines, "out", row.get("out", MISSING), least=0),
            session=label(lines, "sid", row.get("sid", MISSING)),
            think=seconds(lines, "think_s", row.get("think_s", 0), least=0),
        )
        size = (
            integer(lines, "block", row.get("block", MISSING), least=1) if "block" in row or "blocks" in row else None
        )
        if records and size != block_size:
            raise lines.error(f"its block is {_tokens(size)}, expected {_tokens(block_size)} as on the lines before")
        block_size = size
        if size is not None:
            record.blocks = integers(lines, "blocks", row.get("blocks", MISSING))
            check_cover(lines, "blocks", record.blocks, record.prompt_tokens, size)
        records.append(record)
    if block_size is None:
        return separate_trace(lines, FORMAT.name, records)
    return numbered_trace(lines, FORMAT.name, records, block_size)


def _tokens(block_size: int | None) -> str:
    return "absent" if block_size is None else f"{block_size} tokens"


FORMAT = TraceFormat(
    name="blocks",
    example='{"t": 2.75, "in": 900, "out": 40, "block": 512, "blocks": [0, 1], "sid": "a", "think_s": 1.5}',
    is_json=True,
    recognises=lambda names: names >= {"t", "in", "out"},
    read=_read,
)
