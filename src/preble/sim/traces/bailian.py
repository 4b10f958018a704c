"""The traces of Qwen on Alibaba's Bailian: JSON lines with the hashes of 16-token blocks, and conversations.

Published with "KVCache Cache in the Wild" (USENIX ATC '25) at github.com/alibaba-edu/qwen-bailian-usagetraces-anon.
`timestamp` is in seconds. A block's number stands for its own 16 tokens only, so it may come again further back.
Every request is a chat of its own that names its parent, -1 at the root; a session is all that descends from one root,
or from one parent that the file does not have. When a request ended is not recorded, so think times are 0: in a closed
loop a turn is sent as soon as the one before has ended.
"""

from __future__ import annotations

from preble.sim.traces.assembly import Record, check_cover, numbered_trace
from preble.sim.traces.fields import MISSING, integer, integers, json_object, label, seconds
from preble.sim.traces.file_trace import FileTrace
from preble.sim.traces.lines import Lines
from preble.sim.traces.trace_format import ReadingOptions, TraceFormat

BLOCK_SIZE = 16
NO_PARENT = "-1"


def _read(lines: Lines, _: ReadingOptions) -> FileTrace:
    records = []
    chats: list[tuple[str, int]] = []
    parents: dict[str, str | None] = {}
    for line in lines:
        row = json_object(lines, line)
        tokens = integer(lines, "input_length", row.get("input_length", MISSING), least=1)
        blocks = integers(lines, "hash_ids", row.get("hash_ids", MISSING))
        check_cover(lines, "hash_ids", blocks, tokens, BLOCK_SIZE)
        records.append(
            Record(
                time=seconds(lines, "timestamp", row.get("timestamp", MISSING)),
                prompt_tokens=tokens,
                output_tokens=integer(lines, "output_length", row.get("output_length", MISSING), least=0),
                blocks=blocks,
            )
        )
        chat = label(lines, "chat_id", row.get("chat_id", MISSING))
        if chat is None:
            raise lines.error("chat_id is missing, expected a whole number")
        parent = label(lines, "parent_chat_id", row.get("parent_chat_id", MISSING))
        parents.setdefault(chat, None if parent == NO_PARENT else parent)
        chats.append((chat, lines.number))
    # A child may stand before its parent, so sessions are known only at the end.
    roots: dict[str, str] = {}
    for record, (chat, number) in zip(records, chats, strict=True):
        record.session = _root(lines, chat, number, parents, roots)
    return numbered_trace(lines, FORMAT.name, records, BLOCK_SIZE)


def _root(lines: Lines, chat: str, number: int, parents: dict[str, str | None], roots: dict[str, str]) -> str:
    """Where a chat's line of parents begins. `roots` remembers it for every chat on the way."""
    trail: dict[str, None] = {}
    while chat not in roots:
        if chat in trail:
            raise lines.error(f"chat {chat} descends from itself by parent_chat_id, expected -1 at its root", number)
        trail[chat] = None
        parent = parents.get(chat)
        if parent is None:
            roots[chat] = chat
        else:
            chat = parent
    root = roots[chat]
    roots.update(dict.fromkeys(trail, root))
    return root


FORMAT = TraceFormat(
    name="bailian",
    example='{"chat_id": 7, "parent_chat_id": -1, "timestamp": 2.75, "input_length": 30, "output_length": 40, '
    '"type": "text", "turn": 1, "hash_ids": [0, 1]}',
    is_json=True,
    recognises=lambda names: names >= {"chat_id", "timestamp", "input_length", "hash_ids"},
    read=_read,
)
