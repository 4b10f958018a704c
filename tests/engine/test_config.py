"""`ModelConfig` reads what transformers reads, and refuses what makes no sense."""

from __future__ import annotations

import json
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoints import FAMILIES
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoConfig, Gemma2Config, GPT2Config, LlamaConfig, MixtralConfig, Phi3Config
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from preble.engine.config import ModelConfig
from preble.engine.rope import RotaryEmbedding
from preble.errors import CheckpointError, UnsupportedModel

LLAMA: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": 100,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "rms_norm_eps": 1e-5,
    "eos_token_id": 2,
}
QWEN2 = LLAMA | {"architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2", "num_hidden_layers": 4}


def read(folder: Path, config: dict[str, Any], generation: dict[str, Any] | None = None) -> ModelConfig:
    (folder / "config.json").write_text(json.dumps(config))
    if generation is not None:
        (folder / "generation_config.json").write_text(json.dumps(generation))
    return ModelConfig.from_folder(folder)


@pytest.mark.parametrize("family", FAMILIES)
def test_every_field_is_the_one_transformers_has(tmp_path: Path, family: str) -> None:
    config_class, model_class = FAMILIES[family]
    theirs = config_class(
        architectures=[model_class.__name__],
        num_hidden_layers=3,
        num_key_value_heads=8,
        tie_word_embeddings=True,
        eos_token_id=[3, 4],
        dtype="bfloat16",
    )
    theirs.save_pretrained(tmp_path)
    ours = ModelConfig.from_folder(tmp_path)
    assert ours.architecture == model_class.__name__
    assert ours.fused
    assert ours.vocabulary_size == theirs.vocab_size
    assert ours.hidden_size == theirs.hidden_size
    assert ours.intermediate_size == theirs.intermediate_size
    assert ours.layers == 3
    assert (ours.query_heads, ours.kv_heads) == (theirs.num_attention_heads, 8)
    assert ours.head_dim == 128
    assert ours.context_length == theirs.max_position_embeddings
    assert ours.layer_windows == ((4096 if family == "mistral" else None),) * 3
    assert ours.eos_token_ids == {3, 4}
    assert ours.dtype == "bfloat16"
    assert ours.rms_norm_eps == theirs.rms_norm_eps
    assert ours.qkv_bias == (family == "qwen2")
    assert not ours.output_bias
    assert not ours.mlp_bias
    assert ours.qk_norm == (family == "qwen3")
    assert ours.tied_embeddings


@pytest.mark.parametrize("family", FAMILIES)
def test_absent_fields_are_what_transformers_takes_for_them(tmp_path: Path, family: str) -> None:
    config_class, model_class = FAMILIES[family]
    names = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
    defaults = config_class()
    ours = read(tmp_path, {"architectures": [model_class.__name__]} | {name: getattr(defaults, name) for name in names})
    assert ours.kv_heads == defaults.num_key_value_heads
    assert ours.head_dim == 128
    assert ours.context_length == defaults.max_position_embeddings
    assert ours.layer_windows[0] == (4096 if family == "mistral" else None)
    assert ours.rms_norm_eps == defaults.rms_norm_eps
    assert not ours.tied_embeddings
    assert ours.dtype is None


def test_llama_biases_and_old_dtype_name(tmp_path: Path) -> None:
    config = read(tmp_path, LLAMA | {"attention_bias": True, "mlp_bias": True, "torch_dtype": "float16"})
    assert (config.qkv_bias, config.output_bias, config.mlp_bias, config.dtype) == (True, True, True, "float16")


def test_eos_tokens_of_both_files(tmp_path: Path) -> None:
    assert read(tmp_path, LLAMA | {"eos_token_id": None}).eos_token_ids == frozenset()
    assert read(tmp_path, LLAMA, {"eos_token_id": [7, 2, 9]}).eos_token_ids == {2, 7, 9}


@pytest.mark.parametrize(
    ("changes", "windows"),
    [
        ({"sliding_window": 64}, (None,) * 4),
        ({"sliding_window": 64, "use_sliding_window": True, "max_window_layers": 3}, (None, None, None, 64)),
        ({"sliding_window": 64, "use_sliding_window": True, "max_window_layers": 0}, (64,) * 4),
        (
            {
                "sliding_window": 64,
                "use_sliding_window": True,
                "layer_types": ["sliding_attention", "full_attention"] * 2,
            },
            (64, None, 64, None),
        ),
        # A window as long as the context hides nothing.
        ({"sliding_window": 128, "use_sliding_window": True, "max_window_layers": 0}, (None,) * 4),
    ],
)
def test_windows_per_layer(tmp_path: Path, changes: dict[str, Any], windows: tuple[int | None, ...]) -> None:
    assert read(tmp_path, QWEN2 | changes).layer_windows == windows


ROPES: dict[str, dict[str, Any]] = {
    "none given": {},
    "theta": {"rope_theta": 500_000},
    "linear": {"rope_theta": 1e5, "rope_scaling": {"type": "linear", "factor": 2.5}},
    "dynamic": {"rope_scaling": {"type": "dynamic", "factor": 2.0}},
    "yarn": {"rope_scaling": {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}},
    "yarn without a length": {"rope_scaling": {"rope_type": "yarn", "factor": 4.0}},
    "yarn mscale": {"rope_scaling": {"rope_type": "yarn", "factor": 8, "mscale": 0.7, "mscale_all_dim": 1.1}},
    "llama3": {
        "rope_theta": 500.0,
        "rope_scaling": {
            "rope_type": "llama3",
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 64,
        },
    },
    "longrope": {
        "original_max_position_embeddings": 64,
        "rope_scaling": {
            "rope_type": "longrope",
            "short_factor": [1.0, 1.5, 2.0, 4.0],
            "long_factor": [2.0, 3.0, 9.0, 9.0],
            "factor": 2.0,
            "original_max_position_embeddings": 32,
        },
    },
    "new form": {"rope_parameters": {"rope_type": "linear", "rope_theta": 250.0, "factor": 3.0}},
    "new form without theta": {"rope_parameters": {"rope_type": "default"}},
}


@pytest.mark.parametrize("name", ROPES)
def test_rotations_are_those_of_transformers(tmp_path: Path, name: str) -> None:
    ours = read(tmp_path, LLAMA | ROPES[name])
    theirs = LlamaRotaryEmbedding(AutoConfig.from_pretrained(tmp_path))
    positions = torch.arange(64)
    rotation = RotaryEmbedding(ours, device=torch.device("cpu")).rotation(positions, torch.float32)
    cos, sin = theirs(torch.empty(0), positions[None])
    torch.testing.assert_close(rotation.cos[:, 0], cos[0], atol=1e-6, rtol=0)
    torch.testing.assert_close(rotation.signed_sin[:, 0, 4:], sin[0, :, 4:], atol=1e-6, rtol=0)
    torch.testing.assert_close(rotation.signed_sin[:, 0, :4], -sin[0, :, :4], atol=1e-6, rtol=0)


@pytest.mark.parametrize(
    ("name", "length"), [("theta", 128), ("linear", 128), ("dynamic", 128), ("yarn", 256), ("longrope", 64)]
)
def test_the_context_ends_where_the_frequencies_would_change(tmp_path: Path, name: str, length: int) -> None:
    assert read(tmp_path, LLAMA | ROPES[name]).context_length == length


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"quantization_config": {"quant_method": "gptq"}}, UnsupportedModel, "gptq"),
        ({"hidden_act": "dance"}, UnsupportedModel, "activation 'dance'"),
        ({"architectures": ["T5ForConditionalGeneration"]}, UnsupportedModel, "T5ForConditionalGeneration"),
        ({"architectures": ["OurModel"], "auto_map": {"AutoModel": "x.py"}}, UnsupportedModel, "own Python code"),
        ({"architectures": []}, CheckpointError, "architectures"),
        ({"hidden_size": None}, CheckpointError, "'hidden_size'"),
        ({"hidden_size": 30}, CheckpointError, "multiple of num_attention_heads"),
        ({"hidden_size": "32"}, CheckpointError, "'hidden_size' is '32'"),
        ({"num_key_value_heads": 3}, CheckpointError, "divisor"),
        ({"num_attention_heads": True}, CheckpointError, "num_attention_heads"),
        ({"head_dim": 7}, CheckpointError, "even"),
        ({"num_hidden_layers": 10**9}, CheckpointError, "num_hidden_layers"),
        ({"rms_norm_eps": -1}, CheckpointError, "rms_norm_eps"),
        ({"tie_word_embeddings": "yes"}, CheckpointError, "tie_word_embeddings"),
        ({"eos_token_id": "</s>"}, CheckpointError, "eos_token_id"),
        ({"rope_theta": 0}, CheckpointError, "rope_theta"),
        ({"rope_scaling": {"type": "mystery", "factor": 2.0}}, UnsupportedModel, "'mystery'.*linear"),
        ({"rope_scaling": {"type": "linear"}}, CheckpointError, "rope_scaling has no 'factor'"),
        ({"rope_scaling": [2.0]}, CheckpointError, "rope_scaling"),
        ({"rope_scaling": {"type": "llama3", "factor": 8.0}}, CheckpointError, "low_freq_factor"),
        (
            {"rope_scaling": {"type": "longrope", "short_factor": [1.0], "long_factor": [1.0]}},
            CheckpointError,
            "short_factor.*4 numbers",
        ),
        ({"rope_parameters": {"full_attention": {"rope_theta": 1.0}}}, UnsupportedModel, "differs between layers"),
        ({"partial_rotary_factor": 0.5}, UnsupportedModel, "partial_rotary_factor"),
    ],
)
def test_bad_configs(tmp_path: Path, changes: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message) as caught:
        read(tmp_path, LLAMA | changes)
    assert "config.json" in str(caught.value)


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"layer_types": ["full_attention"]}, CheckpointError, "a list of 4 names"),
        ({"layer_types": ["full_attention", "linear_attention"] * 2}, UnsupportedModel, "linear_attention"),
        ({"max_window_layers": -1}, CheckpointError, "max_window_layers"),
    ],
)
def test_bad_windows(tmp_path: Path, changes: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        read(tmp_path, QWEN2 | changes)


def test_missing_folder_and_files(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="nowhere is not a folder"):
        ModelConfig.from_folder(tmp_path / "nowhere")
    with pytest.raises(CheckpointError, match=r"no config\.json"):
        ModelConfig.from_folder(tmp_path)


@pytest.mark.parametrize("content", [b"", b"[1]", b"\xff\xfe{", b"{" * 100, b'{"a":' * 100_000, b'{"a": 1e9999x}'])
def test_config_that_is_no_json_object(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "config.json").write_bytes(content)
    with pytest.raises(CheckpointError, match=r"config\.json"):
        ModelConfig.from_folder(tmp_path)


ROPE_FIELDS = ["type", "factor", "rope_theta", "low_freq_factor", "high_freq_factor", "truncate", "mscale"]
ROPE_FIELDS += ["short_factor", "long_factor", "original_max_position_embeddings", "beta_fast", "attention_factor"]
ROPE_TYPES = ["default", "linear", "dynamic", "yarn", "longrope", "llama3"]
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5) | st.sampled_from([1, *ROPE_TYPES]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(ROPE_FIELDS), inner, max_size=4),
    max_leaves=4,
)
FIELDS = [*LLAMA, "head_dim", "rope_theta", "rope_scaling", "rope_parameters", "sliding_window", "use_sliding_window"]
FIELDS += ["layer_types", "dtype", "hidden_act", "max_window_layers", "tie_word_embeddings", "quantization_config"]


@settings(deadline=None, max_examples=150)
@given(
    base=st.sampled_from([LLAMA, QWEN2, LLAMA | {"architectures": ["MistralForCausalLM"]}]),
    changes=st.dictionaries(st.sampled_from([name for name in FIELDS if name != "architectures"]), JSON, max_size=3),
)
def test_any_json_gives_a_config_or_a_checkpoint_error(
    tmp_path_factory: pytest.TempPathFactory, base: dict[str, Any], changes: dict[str, Any]
) -> None:
    folder = tmp_path_factory.getbasetemp()
    try:
        config = read(folder, base | changes)
    except CheckpointError:
        return
    assert len(config.layer_windows) == config.layers
    if config.head_dim <= 4096:  # the tensors' shapes, which are checked before, rule out more
        with suppress(CheckpointError):
            RotaryEmbedding(config, device=torch.device("cpu"))


def test_other_architectures_run_through_transformers(tmp_path: Path) -> None:
    GPT2Config(n_embd=64, n_head=4, n_layer=3, n_positions=77, architectures=["GPT2LMHeadModel"]).save_pretrained(
        tmp_path
    )
    config = ModelConfig.from_folder(tmp_path)
    assert not config.fused
    assert (config.hidden_size, config.layers, config.query_heads, config.kv_heads) == (64, 3, 4, 4)
    assert (config.head_dim, config.context_length, config.layer_windows) == (16, 77, (None,) * 3)


@pytest.mark.parametrize(
    ("theirs", "windows"),
    [
        (MixtralConfig(num_hidden_layers=2, sliding_window=99, architectures=["MixtralForCausalLM"]), (99, 99)),
        (
            Gemma2Config(num_hidden_layers=2, sliding_window=99, architectures=["Gemma2ForCausalLM"]),
            (99, None),
        ),
        (LlamaConfig(num_hidden_layers=2, hidden_act="gelu", architectures=["LlamaForCausalLM"]), (None, None)),
    ],
)
def test_windows_of_other_architectures(tmp_path: Path, theirs: Any, windows: tuple[int | None, ...]) -> None:
    theirs.save_pretrained(tmp_path)
    config = ModelConfig.from_folder(tmp_path)
    assert not config.fused
    assert config.layer_windows == windows


def test_longrope_limits_other_architectures_too(tmp_path: Path) -> None:
    scaling = {
        "rope_type": "longrope",
        "rope_theta": 10_000.0,
        "short_factor": [1.0] * 48,
        "long_factor": [2.0] * 48,
        "original_max_position_embeddings": 4096,
        "factor": 32.0,
    }
    Phi3Config(
        num_hidden_layers=1,
        max_position_embeddings=131_072,
        original_max_position_embeddings=4096,
        rope_parameters=scaling,
        architectures=["Phi3ForCausalLM"],
    ).save_pretrained(tmp_path)
    assert ModelConfig.from_folder(tmp_path).context_length == 4096
