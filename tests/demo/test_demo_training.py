"""The training of the built-in model: a seed chooses the weights, and the folder is like the one that is shipped."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

from preble.demo import CHECKPOINT

ROOT = Path(__file__).parents[2]


def trained(seed: int, folder: Path) -> str:
    """The hash of the weights after a few steps."""
    command = [sys.executable, "-m", "tools.demo_model", "train", "--steps", "4", "--seed", str(seed), "--out", folder]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    (found,) = re.findall(r"SHA-256 of the weights: ([0-9a-f]{64})", done.stdout)
    return found


@pytest.mark.long
def test_a_seed_chooses_the_weights_to_the_last_bit(tmp_path: Path) -> None:
    first, again, other = (trained(seed, tmp_path / name) for seed, name in ((0, "first"), (0, "again"), (1, "other")))
    assert first == again != other
    for file in CHECKPOINT.iterdir():
        if file.name not in ("README.md", "model.safetensors"):
            assert (tmp_path / "first" / file.name).read_bytes() == file.read_bytes(), file.name
