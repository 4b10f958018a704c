"""One target of a coverage-guided fuzzer: `python atheris_target.py TARGET [options of libFuzzer]`."""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import atheris

INSTRUMENTED = [f"preble.engine.{name}" for name in "frames wire checkpoint config rope_config json_fields".split()]
INSTRUMENTED += [f"preble.engine.template_{name}" for name in "meter filters environment".split()]
INSTRUMENTED += [f"jinja2.{name}" for name in "lexer parser compiler idtracking runtime filters sandbox".split()]

with atheris.instrument_imports(include=INSTRUMENTED):
    from preble.engine import template_meter
    from preble.engine.chat_template import compile_template
    from preble.engine.checkpoint import Checkpoint
    from preble.engine.config import ModelConfig
    from preble.engine.frames import FrameError, FrameReader
    from preble.engine.wire import decode_commands, decode_launch, decode_news
    from preble.errors import CheckpointError

MESSAGES = [{"role": "user", "content": "Hello <b>", "n": [1, 2.5, None]}, {"role": "assistant", "content": ""}]


def frames(data: bytes) -> None:
    reader = FrameReader()
    with suppress(FrameError):
        for start in range(0, len(data), 7):
            for payload in reader.payloads(data[start : start + 7]):
                messages(payload)


def messages(data: bytes) -> None:
    for decode in (decode_commands, decode_news, decode_launch):
        with suppress(FrameError):
            decode(data)


def templates(data: bytes) -> None:
    meter = template_meter.Meter(100_000, 100_000)
    # Whatever is raised, `Tokenizer.chat` makes one error of it; what counts is that it ends.
    with suppress(Exception), template_meter.metered(meter):
        compile_template(data.decode(errors="replace")).render(messages=MESSAGES, tools=None, bos_token="<s>")
    assert meter.left >= -(1 << 20)


def in_file(name: str, read: Callable[[Path], object]) -> Callable[[bytes], None]:
    folder = Path(tempfile.mkdtemp(prefix="fuzz-"))

    def target(data: bytes) -> None:
        (folder / name).write_bytes(data)
        with suppress(CheckpointError):
            read(folder)

    return target


TARGETS: dict[str, Callable[[bytes], None]] = {
    "frames": frames,
    "messages": messages,
    "templates": templates,
    "config": in_file("config.json", ModelConfig.from_folder),
    "safetensors": in_file("model.safetensors", Checkpoint),
}

if __name__ == "__main__":
    name, *options = sys.argv[1:]
    atheris.Setup([sys.argv[0], *options], TARGETS[name])
    atheris.Fuzz()
