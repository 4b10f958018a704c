"""Checkpoint files by anybody: a config, a header or a tokenizer is read, or refused with `CheckpointError`."""

from __future__ import annotations

import json
import shutil
import struct
from pathlib import Path
from random import Random
from typing import Any

import pytest
import torch
from hostile_values import check_brief, fuzz, mutated
from hypothesis import strategies as st
from safetensors.torch import save_file

from preble.engine.checkpoint import Checkpoint
from preble.engine.config import ModelConfig
from preble.engine.json_fields import JsonFields
from preble.engine.tokenizer import Tokenizer
from preble.errors import CheckpointError, InvalidRequest

LLAMA: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": 100,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 128,
    "rms_norm_eps": 1e-5,
    "rope_theta": 1e4,
    "rope_scaling": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64},
    "sliding_window": 16,
    "use_sliding_window": True,
    "max_window_layers": 1,
    "layer_types": ["full_attention", "sliding_attention"],
    "hidden_act": "silu",
    "tie_word_embeddings": False,
    "attention_bias": False,
    "dtype": "float32",
    "eos_token_id": [2, 3],
    "quantization_config": None,
}
OTHERS = ["Qwen2ForCausalLM", "Qwen3ForCausalLM", "MistralForCausalLM"]
VALUES: list[Any] = [None, True, 0, -1, 1, 3, 2**31, 2**63, 2**64, 10**400, -(10**400), 0.0, -0.5, 1e300, 1e400, -1e400]
VALUES += [
    float("nan"),
    "",
    "yarn",
    "longrope",
    "dynamic",
    "a" * 10_000,
    "\ud800",
    [],
    [None],
    [1] * 1000,
    {},
    {"a": {}},
]
VALUES += [{"rope_type": "longrope", "short_factor": [1] * 4, "long_factor": [1e30] * 4}, {"rope_type": []}, [[[[]]]]]
VALUES += [
    {"rope_type": "yarn", "factor": 1e29},
    {"rope_type": "llama3", "factor": 1},
    {"type": "linear", "factor": "2"},
]
CHANGES = st.dictionaries(
    st.sampled_from(sorted({*LLAMA} - {"hidden_act"})),
    st.sampled_from(VALUES) | st.integers() | st.floats(),
    max_size=4,
)


def test_configs(tmp_path: Path) -> None:
    file = tmp_path / "config.json"

    def attempt(changes: dict[str, Any], random: Random) -> None:
        values = LLAMA | {name: random.choice(VALUES) if random.random() < 0.3 else changes[name] for name in changes}
        if random.random() < 0.5:
            values["architectures"] = [random.choice(OTHERS)]
        content = json.dumps(values).encode()
        file.write_bytes(mutated(content, random) if random.random() < 0.4 else content)
        try:
            config = ModelConfig.from_folder(tmp_path)
        except CheckpointError as error:
            check_brief(error)
            return
        assert len(config.layer_windows) == config.layers <= 10_000
        assert 0 < config.context_length < 2**31

    fuzz("config.json", 25, CHANGES, attempt)


def test_safetensors(tmp_path: Path) -> None:
    file = tmp_path / "model.safetensors"
    save_file({"a": torch.ones(3, 4), "b": torch.ones(5, dtype=torch.bfloat16), "../c": torch.ones(1)}, file)
    good = file.read_bytes()
    (length,) = struct.unpack("<Q", good[:8])
    header = json.loads(good[8 : 8 + length])

    def attempt(changed: dict[str, Any], random: Random) -> None:
        if random.random() < 0.5:
            content = mutated(good, random)
        else:
            entries = header | {
                name: random.choice((header["a"], header["b"])) | value for name, value in changed.items()
            }
            encoded = json.dumps(entries).encode()
            content = (
                struct.pack("<Q", len(encoded) + random.choice((0, 0, 0, 1, -1, 2**40))) + encoded + good[8 + length :]
            )
        file.write_bytes(content)
        try:
            checkpoint = Checkpoint(tmp_path)
            for name, entry in checkpoint.tensors.items():
                assert checkpoint.tensor(name).shape == entry.shape
        except CheckpointError as error:
            check_brief(error)

    numbers = st.sampled_from([0, 1, 4, 48, 58, 62, 2**31, 2**63, 2**64 - 1, -1, 2**70])
    entry = st.fixed_dictionaries(
        {},
        optional={
            "dtype": st.sampled_from(["F32", "BF16", "F8_E4M3", "BOOL", "F4", "I64", "", "x", None, 5]),
            "shape": st.lists(numbers, max_size=4) | st.none(),
            "data_offsets": st.lists(numbers, max_size=3) | st.none(),
            "more": st.none(),
        },
    )
    names = st.sampled_from(["a", "b", "c", "../../etc/passwd", "/dev/zero", "", "\ud800", "__metadata__", "x" * 9999])
    fuzz("safetensors", 10, st.dictionaries(names, entry, max_size=3), attempt)


def test_tokenizer_files(llama: Path, tmp_path: Path) -> None:
    files = ["tokenizer.json", "tokenizer_config.json"]
    for name in (*files, "config.json"):
        shutil.copy(llama / name, tmp_path / name)
    good = {name: (llama / name).read_bytes() for name in files}

    def attempt(name: str, random: Random) -> None:
        (tmp_path / name).write_bytes(mutated(good[name], random))
        try:
            tokenizer = Tokenizer(tmp_path)
            tokenizer.decode(tokenizer.encode("naïve café 😀"))
            tokenizer.decode(tokenizer.chat([{"role": "user", "content": "Hello"}]))
        except (CheckpointError, InvalidRequest) as error:
            check_brief(error)
        (tmp_path / name).write_bytes(good[name])

    fuzz("tokenizer files", 5, st.sampled_from(files), attempt)


HUGE = {
    "deeply nested": b'{"a":' + b"[" * 200_000,
    "a field twice": b'{"vocab_size": 5, "vocab_size": 6}',
    "a long number": b'{"vocab_size": ' + b"9" * 100_000 + b"}",
    "bytes that are no text": b'{"\xff": 1}',
    "nothing": b"",
    "a list": b"[]",
}


@pytest.mark.parametrize("name", HUGE)
@pytest.mark.parametrize("file", ["config.json", "generation_config.json", "model.safetensors.index.json"])
def test_json_that_is_no_config(llama: Path, tmp_path: Path, name: str, file: str) -> None:
    for one in llama.iterdir():
        shutil.copy(one, tmp_path / one.name)
    if file.startswith("model"):
        (tmp_path / "model.safetensors").unlink()
    (tmp_path / file).write_bytes(HUGE[name])
    read: Any = Checkpoint if file.startswith("model") else ModelConfig.from_folder
    with pytest.raises(CheckpointError, match=file.replace(".", r"\.")):
        read(tmp_path)


def test_a_long_file_is_not_read(tmp_path: Path) -> None:
    path = tmp_path / "config.json"
    with path.open("wb") as file:
        file.truncate(200 << 20)
    with pytest.raises(CheckpointError, match="longer than 64 MiB"):
        JsonFields.read(path)
    (tmp_path / "tokenizer_config.json").symlink_to(path)
    with pytest.raises(CheckpointError, match=r"tokenizer_config\.json is longer than"):
        Tokenizer(tmp_path)


def test_a_long_header_is_not_read(tmp_path: Path) -> None:
    with (tmp_path / "model.safetensors").open("wb") as file:
        file.write(struct.pack("<Q", 90 << 20))
        file.truncate(100 << 20)
    with pytest.raises(CheckpointError, match="header claims 94371840 bytes"):
        Checkpoint(tmp_path)


MIXTRAL = {"architectures": ["MixtralForCausalLM"], "model_type": "mixtral"}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"n_layer": 2**31}, "must be 10000 at most"),
        ({"n_layer": 9_999}, "30 tensors, but config.json 9999 layers"),
        ({"num_labels": 10**9}, "must be 10000 at most"),
        ({"n_embd": 1 << 20, "n_head": 1, "n_inner": 1 << 20}, "announces a model of"),
        ({"vocab_size": 2**31 - 1}, "announces a model of"),
        (MIXTRAL | {"num_local_experts": 10**9}, "must be 10000 at most"),
        (MIXTRAL | {"num_hidden_layers": 10**9}, "must be 10000 at most"),
        (MIXTRAL | {"num_hidden_layers": 5_000, "num_local_experts": 9_999}, "are too many"),
    ],
)
def test_what_a_config_announces_is_there_before_memory_is_taken(
    tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    """In architectures that transformers runs: it would make the whole model first and look at the files then."""
    from preble.engine.transformers_code import load_code

    values = {"architectures": ["GPT2LMHeadModel"], "model_type": "gpt2", "n_layer": 2, "n_embd": 8, "n_head": 2}
    (tmp_path / "config.json").write_text(json.dumps(values | {"vocab_size": 50, "n_positions": 64} | changes))
    save_file({f"a{number}": torch.ones(3, 4) for number in range(30)}, tmp_path / "model.safetensors")

    def load() -> None:
        load_code(tmp_path, ModelConfig.from_folder(tmp_path), device=torch.device("cpu"), dtype="float32")

    with pytest.raises(CheckpointError, match=message):
        load()


def test_no_code_of_a_checkpoint_runs(llama: Path, tmp_path: Path) -> None:
    """Whatever names it: `auto_map` in any file, or weights that are pickles."""
    for one in llama.iterdir():
        shutil.copy(one, tmp_path / one.name)
    (tmp_path / "own.py").write_text("raise SystemExit('this ran')")
    auto_map = dict.fromkeys(("AutoConfig", "AutoModelForCausalLM", "AutoTokenizer"), "own.Own")
    for name in ("config.json", "tokenizer_config.json"):
        values = json.loads((tmp_path / name).read_text()) | {"auto_map": auto_map}
        (tmp_path / name).write_text(json.dumps(values))
    # A known architecture is run by known code.
    assert ModelConfig.from_folder(tmp_path).architecture == "LlamaForCausalLM"
    assert len(Tokenizer(tmp_path).encode("a")) == 2
    values = json.loads((tmp_path / "config.json").read_text()) | {"model_type": "own", "architectures": ["Own"]}
    (tmp_path / "config.json").write_text(json.dumps(values))
    with pytest.raises(CheckpointError, match="never runs"):
        ModelConfig.from_folder(tmp_path)
    (tmp_path / "model.safetensors").rename(tmp_path / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match="Preble reads safetensors"):
        Checkpoint(tmp_path)
