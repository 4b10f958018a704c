"""Checkpoint folders: where they are found, what is read, and the error for everything that can be wrong with one."""

from __future__ import annotations

import json
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoints import write_checkpoint
from huggingface_hub import constants
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from preble.engine.checkpoint import Checkpoint, check_folder, resolve_model
from preble.engine.config import ModelConfig
from preble.engine.decoder import load_decoder
from preble.errors import CheckpointError, UnsupportedModel


def load(folder: Path) -> None:
    check_folder(folder)
    load_decoder(folder, ModelConfig.from_folder(folder), device=torch.device("cpu"), dtype="auto")


def rewrite(folder: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> None:
    """Change the tensors of an unsharded checkpoint."""
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    (folder / "model.safetensors").unlink()  # other tests may have it mapped
    save_file(tensors, folder / "model.safetensors")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    write_checkpoint(tmp_path)
    return tmp_path


@pytest.fixture
def sharded(tmp_path: Path) -> Path:
    write_checkpoint(tmp_path, max_shard_size="10KB")
    return tmp_path


def test_tensors_by_name_from_shards(sharded: Path) -> None:
    assert not (sharded / "model.safetensors").exists()
    checkpoint = Checkpoint(sharded)
    files = {entry.file for entry in checkpoint.tensors.values()}
    assert len(files) > 2
    for file in files:
        with safe_open(file, framework="pt") as shard:
            for name in shard.keys():  # noqa: SIM118 - the handle itself cannot be iterated
                assert torch.equal(checkpoint.tensor(name), shard.get_tensor(name))
    assert checkpoint.main_dtype == "float32"
    load(sharded)


def test_a_tensor_in_two_files_is_taken_from_the_one_the_index_names(tmp_path: Path) -> None:
    save_file({"a": torch.zeros(2)}, tmp_path / "x.safetensors")
    save_file({"a": torch.ones(2), "b": torch.ones(3)}, tmp_path / "y.safetensors")
    index = {"weight_map": {"a": "x.safetensors", "b": "y.safetensors"}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    assert Checkpoint(tmp_path).tensor("a").tolist() == [0, 0]


@pytest.mark.parametrize("padding", [0, 1, 2, 3])
def test_tensors_that_are_not_aligned_in_the_file(tmp_path: Path, padding: int) -> None:
    header = json.dumps({"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}}).encode() + b" " * padding
    (tmp_path / "model.safetensors").write_bytes(struct.pack("<Q", len(header)) + header + struct.pack("<2f", 1, 2))
    tensor = Checkpoint(tmp_path).tensor("a")
    assert tensor.tolist() == [1, 2]
    assert tensor.data_ptr() % 4 == 0


def test_weights_are_held_once(tmp_path: Path) -> None:
    """After loading, nothing of the file is in memory but what a tied embedding table needs of it."""
    write_checkpoint(tmp_path, vocab_size=8192, hidden_size=256, intermediate_size=512, tie_word_embeddings=True)
    decoder = load_decoder(tmp_path, ModelConfig.from_folder(tmp_path), device=torch.device("cpu"), dtype="auto")
    mapped = resident = 0
    inside = False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        first = line.split()[0]
        if not first.endswith(":"):
            inside = str(tmp_path) in line
        elif inside and first == "Rss:":
            mapped, resident = mapped + 1, resident + int(line.split()[1])
    assert decoder.config.tied_embeddings
    assert mapped <= 1
    # The header, and what the system read around it.
    assert resident * 1024 < (tmp_path / "model.safetensors").stat().st_size / 8


# Folders


def test_missing_folder(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="nowhere is not a folder"):
        check_folder(tmp_path / "nowhere")


@pytest.mark.parametrize("name", ["config.json", "tokenizer.json", "model.safetensors"])
def test_missing_files_are_named(folder: Path, name: str) -> None:
    (folder / name).unlink()
    with pytest.raises(CheckpointError, match=name.replace(".", r"\.")):
        load(folder)


@pytest.mark.parametrize("names", [("tokenizer.model",), ("vocab.json", "merges.txt")])
def test_other_tokenizer_files_will_do(folder: Path, names: tuple[str, ...]) -> None:
    (folder / "tokenizer.json").unlink()
    for name in names:
        (folder / name).touch()
    check_folder(folder)


def test_a_bin_checkpoint_says_how_to_convert_it(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match=r"only pytorch_model\.bin.*save_pretrained"):
        load(folder)


@pytest.mark.parametrize(
    ("index", "message"),
    [
        ({"weight_map": {"model.norm.weight": "model-00009.safetensors"}}, r"not there: model-00009\.safetensors"),
        ({"weight_map": {"model.norm.weight": "../model.safetensors"}}, "not a file name"),
        ({"weight_map": {"model.norm.weight": "/etc/passwd"}}, "not a file name"),
        ({"weight_map": {"model.norm.weight": "a" * 5000}}, "not there"),
        ({"weight_map": {"model.norm.weight": "nul\0"}}, "not there"),
        ({"weight_map": {"model.norm.weight": 5}}, "not a file name"),
        ({"weight_map": ["model.norm.weight"]}, "weight_map"),
        ({}, "weight_map"),
    ],
)
def test_bad_index(sharded: Path, index: dict[str, Any], message: str) -> None:
    (sharded / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(CheckpointError, match=message):
        load(sharded)


# Tensors


def test_missing_tensors_are_named(folder: Path) -> None:
    rewrite(folder, lambda tensors: tensors.pop("model.layers.1.mlp.up_proj.weight"))
    with pytest.raises(CheckpointError, match=r"missing: model\.layers\.1\.mlp\.up_proj\.weight$"):
        load(folder)


def test_missing_tensors_of_another_shard_are_named(sharded: Path) -> None:
    index = json.loads((sharded / "model.safetensors.index.json").read_text())
    gone = index["weight_map"]["model.norm.weight"]
    index["weight_map"] = {name: file for name, file in index["weight_map"].items() if file != gone}
    (sharded / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(CheckpointError, match=r"missing: .*model\.norm\.weight"):
        load(sharded)


def test_superfluous_tensors_are_named(folder: Path) -> None:
    rewrite(folder, lambda tensors: tensors.update({"model.layers.2.extra": torch.zeros(1)}))
    with pytest.raises(CheckpointError, match=r"unexpected: model\.layers\.2\.extra$"):
        load(folder)


def test_wrong_shapes_are_named_with_both_shapes(folder: Path) -> None:
    rewrite(folder, lambda tensors: tensors.update({"lm_head.weight": torch.zeros(272, 31)}))
    with pytest.raises(CheckpointError, match=r"wrong shape: lm_head\.weight is \[272, 31\], not \[272, 32\]$"):
        load(folder)


def test_many_wrong_tensors_are_counted(folder: Path) -> None:
    rewrite(folder, lambda tensors: [tensors.pop(name) for name in list(tensors)[:8]])
    with pytest.raises(CheckpointError, match=r"(, [\w.]+){4} and 3 more"):
        load(folder)


def test_a_config_for_another_shape(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"num_hidden_layers": 10_000, "vocab_size": 2**31 - 1}))
    with pytest.raises(CheckpointError, match=r"missing: .* more; of the wrong shape: model\.embed_tokens"):
        load(folder)


def test_benign_extras_are_ignored(tmp_path: Path) -> None:
    write_checkpoint(tmp_path, tie_word_embeddings=True)
    extras = {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(4), "lm_head.weight": torch.ones(272, 32)}
    rewrite(tmp_path, lambda tensors: tensors.update(extras))
    load(tmp_path)


@pytest.mark.parametrize("dtype", [torch.int8, torch.float8_e4m3fn])
def test_quantized_tensors_without_a_quantization_config(folder: Path, dtype: torch.dtype) -> None:
    name = "model.layers.0.mlp.up_proj.weight"
    rewrite(folder, lambda tensors: tensors.update({name: tensors[name].to(dtype)}))
    with pytest.raises(UnsupportedModel, match=rf"{name} is stored as (I8|F8_E4M3); supported are float64"):
        load(folder)


# Damaged files


@pytest.mark.parametrize("keep", [0, 7, 100, -1])
def test_truncated_weights(folder: Path, keep: int) -> None:
    file = folder / "model.safetensors"
    content = file.read_bytes()
    file.write_bytes(content[:keep])
    with pytest.raises(CheckpointError, match=r"model\.safetensors is cut short, corrupt"):
        load(folder)


def test_a_truncated_shard_is_named(sharded: Path) -> None:
    shard = sorted(sharded.glob("model-*.safetensors"))[1]
    shard.write_bytes(shard.read_bytes()[:-1])
    with pytest.raises(CheckpointError, match=shard.name):
        load(sharded)


HEADERS = [
    {"a": {"dtype": "F32", "shape": [2**63, 2], "data_offsets": [0, 8]}},
    {"a": {"dtype": "F32", "shape": [-1], "data_offsets": [0, 8]}},
    {"a": {"dtype": "F32", "shape": [2], "data_offsets": [8, 0]}},
    {"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 2**64 - 1]}},
    {"a": {"dtype": "F33", "shape": [2], "data_offsets": [0, 8]}},
    {"a": {"dtype": "F32", "shape": [2], "data_offsets": [4, 12]}},
    {"a": None},
    [],
]


@pytest.mark.parametrize("header", HEADERS)
def test_senseless_headers(folder: Path, header: object) -> None:
    encoded = json.dumps(header).encode()
    (folder / "model.safetensors").write_bytes(struct.pack("<Q", len(encoded)) + encoded + bytes(8))
    with pytest.raises(CheckpointError, match="corrupt"):
        load(folder)


@settings(deadline=None, max_examples=100)
@given(data=st.data())
def test_any_change_of_the_header_is_harmless_or_an_error(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    folder = tmp_path_factory.mktemp("damaged")
    save_file({"a": torch.ones(3, 4), "b": torch.ones(5, dtype=torch.bfloat16)}, folder / "model.safetensors")
    content = bytearray((folder / "model.safetensors").read_bytes())
    header = 8 + struct.unpack("<Q", content[:8])[0]
    for _ in range(data.draw(st.integers(1, 4))):
        content[data.draw(st.integers(0, header - 1))] = data.draw(st.integers(0, 255))
    (folder / "model.safetensors").write_bytes(content)
    try:
        checkpoint = Checkpoint(folder)
        for name, entry in checkpoint.tensors.items():
            assert checkpoint.tensor(name).shape == entry.shape
    except CheckpointError:
        pass


# Names


def test_a_local_folder_is_taken_as_it_is(folder: Path) -> None:
    assert resolve_model(folder) == folder
    assert resolve_model(str(folder)) == folder


def test_a_file_is_not_a_checkpoint(folder: Path) -> None:
    with pytest.raises(CheckpointError, match=r"model\.safetensors is a file"):
        resolve_model(folder / "model.safetensors")


@pytest.mark.parametrize("name", ["./nowhere", "/no/where", "a/b/c", "~/nowhere", "", "org/..", Path("org/name")])
def test_paths_are_not_looked_up_on_the_hub(name: str | Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    with pytest.raises(CheckpointError, match="neither a folder nor a hub id"):
        resolve_model(name)


@pytest.fixture
def hub_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty hub cache, and no network."""
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    return tmp_path / "hub"


def test_hub_id_neither_cached_nor_reachable(hub_cache: Path) -> None:
    with pytest.raises(CheckpointError, match=r"'org/name'.*local cache.*cannot be reached"):
        resolve_model("org/name")


def test_hub_id_from_the_local_cache(hub_cache: Path) -> None:
    repository = hub_cache / "models--org--name"
    snapshot = repository / "snapshots" / ("0" * 40)
    snapshot.mkdir(parents=True)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text("0" * 40)
    (snapshot / "config.json").write_text("{}")
    with pytest.raises(CheckpointError, match=r"0{40} has neither model\.safetensors"):
        resolve_model("org/name")
    write_checkpoint(snapshot)
    assert resolve_model("org/name") == snapshot
