"""Coverage-guided fuzzing with atheris, which `make test-long` installs (`preble[fuzz]`); nothing else needs it."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import made_chat_templates
import pytest
import torch
from safetensors.torch import save
from test_fuzz_checkpoints import LLAMA
from test_fuzz_frames import COMMANDS, NEWS

from preble.engine.frames import FrameWriter
from preble.engine.wire import encode_commands, encode_news

MESSAGES = [*encode_commands(COMMANDS), *encode_news(NEWS)]
SEEDS = {
    "frames": [FrameWriter().frame(payload) for payload in MESSAGES],
    "messages": MESSAGES,
    "templates": [template.encode() for template in made_chat_templates.TEMPLATES.values()],
    "config": [json.dumps(LLAMA).encode()],
    "safetensors": [save({"a": torch.ones(3, 4), "b": torch.ones(5, dtype=torch.bfloat16)})],
}
RUNS = {"frames": 2_000_000, "messages": 1_000_000, "templates": 50_000, "config": 100_000, "safetensors": 60_000}


@pytest.mark.long
@pytest.mark.skipif(
    importlib.util.find_spec("atheris") is None,
    reason="atheris (preble[fuzz]) is not installed; it is not there for every Python",
)
@pytest.mark.parametrize("target", RUNS)
def test_coverage_guided(target: str, tmp_path: Path) -> None:
    for number, seed in enumerate(SEEDS[target]):
        (tmp_path / str(number)).write_bytes(seed)
    command = [sys.executable, str(Path(__file__).with_name("atheris_target.py")), target]
    # A run that takes 20 s, or 4 GB, counts as a failure.
    command += [f"-runs={RUNS[target]}", "-max_len=8192", "-timeout=20", "-rss_limit_mb=4096", str(tmp_path)]
    ended = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, check=False)
    assert ended.returncode == 0, ended.stderr[-3000:]
    assert f"Done {RUNS[target]} runs" in ended.stderr
