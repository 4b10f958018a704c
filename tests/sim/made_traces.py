"""Small trace files for the tests of their readers."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path

import numpy as np

from preble.sim.trace import Trace

EXAMPLES = {
    "mooncake": [
        '{"timestamp": 1000, "input_length": 1100, "output_length": 5, "hash_ids": [7, 8, 9]}',
        '{"timestamp": 1500, "input_length": 1024, "output_length": 6, "hash_ids": [7, 8]}',
        '{"timestamp": 1700, "input_length": 600, "output_length": 7, "hash_ids": [7, 10]}',
    ],
    "bailian": [
        '{"chat_id": 1, "parent_chat_id": -1, "timestamp": 0.5, "input_length": 30, "output_length": 5, '
        '"type": "text", "turn": 1, "hash_ids": [3, 4]}',
        '{"chat_id": 2, "parent_chat_id": 1, "timestamp": 1.0, "input_length": 40, "output_length": 6, '
        '"type": "text", "turn": 2, "hash_ids": [3, 5, 6]}',
        '{"chat_id": 3, "parent_chat_id": -1, "timestamp": 1.2, "input_length": 16, "output_length": 7, '
        '"type": "search", "turn": 1, "hash_ids": [3]}',
    ],
    "azure": [
        "TIMESTAMP,ContextTokens,GeneratedTokens",
        "2023-11-16 18:17:03.9799600,4808,10",
        "2023-11-16 18:17:04.0319600,3180,8",
        "2023-11-16 18:17:05.9799600,110,27",
    ],
    "burstgpt": [
        "Timestamp,Model,Request tokens,Response tokens,Total tokens,Log Type",
        "5,ChatGPT,472,18,490,Conversation log",
        "45,ChatGPT,1087,230,1317,Conversation log",
        "118,GPT-4,417,276,693,API log",
    ],
    "blocks": [
        '{"t": 0.0, "in": 20, "out": 5, "block": 16, "blocks": [4, 5], "sid": "a", "turn": 0, "think_s": 0.0}',
        '{"t": 0.25, "in": 16, "out": 6, "block": 16, "blocks": [4]}',
        '{"t": 2.5, "in": 40, "out": 7, "block": 16, "blocks": [4, 6, 7], "sid": "a", "turn": 1, "think_s": 1.5}',
    ],
    "prompts": [
        '{"text": "Once upon a time", "t": 3, "output_tokens": 9, "session": "a"}',
        '{"text": "Once more", "t": 4.5}',
        '{"prompt": "Twice", "t": 5, "session": 17}',
    ],
}
"""Format -> the lines of a file."""


def saved(folder: Path, lines: Iterable[str | dict[str, object]], name: str = "trace.jsonl") -> Path:
    """A file of these lines; what is not text is written as JSON."""
    path = folder / name
    path.write_text("".join((one if isinstance(one, str) else json.dumps(one)) + "\n" for one in lines))
    return path


def shared_tokens(trace: Trace, one: int, other: int) -> int:
    """How long a prefix two prompts have in common."""
    first, second = (trace.tokens(trace.requests[number]) for number in (one, other))
    length = min(len(first), len(second))
    differ = np.flatnonzero(first[:length] != second[:length])
    return int(differ[0]) if len(differ) else length
