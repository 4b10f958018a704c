"""Checkpoints of the benchmark: the shapes they promise, readable by transformers, the same every time."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors import safe_open
from transformers import AutoModelForCausalLM, AutoTokenizer

from preble.bench import shapes
from preble.bench.peers.gguf_file import bf16_tensors, gguf_name, interleave_rope
from preble.bench.shapes import SHAPES, SMALL, Shape, write_checkpoint

TINY = Shape("tiny", 64, 2, heads=4, kv_heads=2, intermediate=96, vocabulary=3000, tied=False)


@pytest.mark.parametrize(("name", "millions"), [("2048x6", 401.6), ("100m", 100.1), ("0.5b", 494.0)])
def test_parameter_counts(name: str, millions: float) -> None:
    assert SHAPES[name].parameters / 1e6 == pytest.approx(millions, abs=0.1)


def test_the_small_shape_is_what_its_name_says_in_fp32(tmp_path: Path) -> None:
    assert SMALL.name == "2m"
    assert SMALL.parameters / 1e6 == pytest.approx(2, abs=0.1)
    write_checkpoint(SMALL, tmp_path)
    (file,) = tmp_path.glob("*.safetensors")
    with safe_open(file, "pt") as stored:
        weights = [stored.get_tensor(name) for name in stored.keys()]  # noqa: SIM118, not a dict
    assert {weight.dtype for weight in weights} == {torch.float32}
    assert sum(weight.nbytes for weight in weights) == SMALL.nbytes == 4 * SMALL.parameters


@pytest.mark.parametrize("shape", [*SHAPES.values(), SMALL], ids=[*SHAPES, SMALL.name])
def test_heads_fill_the_hidden_size(shape: Shape) -> None:
    assert shape.heads * shape.head_dim == shape.hidden
    assert shape.heads % shape.kv_heads == 0


def test_transformers_reads_it_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shapes, "SHARD_BYTES", 100_000)
    write_checkpoint(TINY, tmp_path)
    model, info = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16, output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    assert sum(parameter.numel() for parameter in model.parameters()) == TINY.parameters
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())["weight_map"]
    assert set(index) == set(TINY.tensors())
    assert len(set(index.values())) > 1


def test_every_token_has_a_text_of_its_own(tmp_path: Path) -> None:
    write_checkpoint(TINY, tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    pieces = tokenizer.convert_ids_to_tokens(list(range(TINY.vocabulary)))
    assert len(tokenizer) == len(set(pieces)) == TINY.vocabulary
    text = "Two bytes: é, a pair, XyZ"
    assert tokenizer.decode(tokenizer(text)["input_ids"]) == text


def test_the_seed_decides_the_weights(tmp_path: Path) -> None:
    files = []
    for name, seed in (("first", 1), ("again", 1), ("other", 2)):
        (tmp_path / name).mkdir()
        write_checkpoint(TINY, tmp_path / name, seed)
        files.append(next((tmp_path / name).glob("*.safetensors")).read_bytes())
    assert files[0] == files[1] != files[2]


def test_raw_bits_are_the_tensors(tmp_path: Path) -> None:
    write_checkpoint(TINY, tmp_path)
    raw = dict(bf16_tensors(tmp_path))
    assert set(raw) == set(TINY.tensors())
    (file,) = tmp_path.glob("*.safetensors")
    with safe_open(file, "pt") as stored:
        for name, bits in raw.items():
            np.testing.assert_array_equal(bits, stored.get_tensor(name).view(torch.uint16).numpy())


def test_every_tensor_has_a_gguf_name() -> None:
    names = {gguf_name(name) for name in TINY.tensors()}
    assert len(names) == len(TINY.tensors())
    assert {"token_embd.weight", "output.weight", "blk.1.ffn_up.weight", "blk.0.attn_q.weight"} <= names


def test_interleaved_rows_give_the_same_attention_scores() -> None:
    """Rotating halves of the original rows or neighbours of the reordered ones: the same query-key products."""
    source = np.random.default_rng(0)
    heads, head_dim, hidden = 3, 8, 16
    query, key = source.normal(size=(2, heads * head_dim, hidden))
    inputs = source.normal(size=(2, hidden))
    angles = 10_000.0 ** (-np.arange(head_dim // 2) / (head_dim // 2))

    def rotated(weight: np.ndarray, x: np.ndarray, position: int, neighbours: bool) -> np.ndarray:
        values = (weight @ x).reshape(heads, head_dim)
        if neighbours:
            first, second = values[:, 0::2], values[:, 1::2]
        else:
            first, second = values[:, : head_dim // 2], values[:, head_dim // 2 :]
        pairs = (first + 1j * second) * np.exp(1j * angles * position)
        return np.concatenate([pairs.real, pairs.imag], axis=1)

    def scores(query: np.ndarray, key: np.ndarray, neighbours: bool) -> np.ndarray:
        return (rotated(query, inputs[0], 7, neighbours) * rotated(key, inputs[1], 3, neighbours)).sum(axis=1)

    expected = scores(query, key, neighbours=False)
    np.testing.assert_allclose(scores(interleave_rope(query, heads), interleave_rope(key, heads), True), expected)
