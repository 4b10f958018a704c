"""The built-in model: the same every time, and it speaks in whole words."""

from __future__ import annotations

from pathlib import Path

import pytest

from preble.cli import main
from preble.demo_model import WORDS, write_demo_model


def test_it_is_written_the_same_every_time(tmp_path: Path) -> None:
    written = []
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        write_demo_model(tmp_path / name)
        written.append({path.name: path.read_bytes() for path in (tmp_path / name).iterdir()})
    assert set(written[0]) == {"config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"}
    assert written[0] == written[1]


@pytest.mark.parametrize("temperature", ["0", "1"])
def test_it_speaks_in_words(temperature: str, capsys: pytest.CaptureFixture[str]) -> None:
    command = ["generate", "--model", "demo", "--max-tokens", "200", "--temperature", temperature, "--seed", "1"]
    assert main([*command, "Where is the old house?"]) == 0
    said = capsys.readouterr().out.split()
    assert len(said) == 200
    assert set(said) <= set(WORDS)
