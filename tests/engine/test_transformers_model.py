"""Architectures outside the fused decoder: transformers' code over our paged cache gives transformers' logits."""

from __future__ import annotations

import json
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest
import torch
from paged_run import PagedRun
from safetensors.torch import load_file, save_file
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, PreTrainedModel

from preble.engine.config import ModelConfig
from preble.engine.transformers_model import TransformersModel, load_transformers_model
from preble.errors import CheckpointError, UnsupportedModel

CPU = torch.device("cpu")
VOCABULARY = 96
HEADS = {"num_attention_heads": 4, "num_key_value_heads": 2}
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
WINDOW_IN_ONE = {"sliding_window": 5, "layer_types": ["sliding_attention", "full_attention"]}
GEMMA3_ROPE = {
    "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
    "full_attention": {"rope_type": "linear", "factor": 4.0, "rope_theta": 1e6},
}
LONGROPE = {
    "rope_type": "longrope",
    "rope_theta": 1e4,
    "short_factor": [1.0, 1.1, 1.3, 1.9],
    "long_factor": [1.0, 2.0, 4.0, 9.0],
}

SUPPORTED: dict[str, tuple[str, dict[str, Any]]] = {
    "gpt2": ("gpt2", {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 128}),
    "opt": ("opt", {"ffn_dim": 48, "word_embed_proj_dim": 32, "num_attention_heads": 4}),
    "gpt_neox": ("gpt_neox", {"num_attention_heads": 4}),
    "gpt_bigcode": ("gpt_bigcode", {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 128}),
    "phi": ("phi", HEADS),
    "phi3": ("phi3", HEADS),
    "phi3 longrope": ("phi3", HEADS | {"rope_parameters": LONGROPE, "original_max_position_embeddings": 64}),
    "stablelm": ("stablelm", HEADS),
    "starcoder2 window": ("starcoder2", HEADS | {"sliding_window": 7}),
    "cohere": ("cohere", HEADS | {"logit_scale": 1.0}),
    "cohere2 window": ("cohere2", HEADS | WINDOW_IN_ONE | {"logit_scale": 1.0}),
    "granite": ("granite", HEADS | {"attention_multiplier": 0.3, "logits_scaling": 2.0}),
    "olmo2": ("olmo2", HEADS),
    "olmo3 window": ("olmo3", HEADS | WINDOW_IN_ONE),
    "gemma": ("gemma", HEADS | {"head_dim": 16}),
    "gemma3 window": ("gemma3_text", HEADS | WINDOW_IN_ONE | {"head_dim": 24, "rope_parameters": GEMMA3_ROPE}),
    "glm4": ("glm4", HEADS | {"head_dim": 8}),
    "nemotron": ("nemotron", HEADS),
    "smollm3": ("smollm3", HEADS | {"no_rope_layers": [1, 0]}),
    "qwen2_moe": ("qwen2_moe", HEADS | EXPERTS | {"shared_expert_intermediate_size": 16}),
    "qwen3_moe": ("qwen3_moe", HEADS | EXPERTS | {"head_dim": 8}),
    "mixtral window": ("mixtral", HEADS | {"num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": 6}),
}
"""Name to `model_type` and the fields of its config that differ from those of `write`."""


def write(folder: Path, model_type: str, fields: dict[str, Any]) -> PreTrainedModel:
    """Write a checkpoint whose every weight is random, and large enough that logits differ by whole units."""
    common = {
        "vocab_size": VOCABULARY,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "max_position_embeddings": 128,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": 0,
    }
    if "n_embd" in fields:
        common = {name: value for name, value in common.items() if name == "vocab_size" or "token" in name}
    model: PreTrainedModel = AutoModelForCausalLM.from_config(CONFIG_MAPPING[model_type](**common, **fields)).eval()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.copy_(1 + 0.3 * noise if parameter.ndim == 1 else noise * parameter.shape[-1] ** -0.5)
    model.save_pretrained(folder)
    return model


def load(folder: Path, dtype: str = "float32") -> TransformersModel:
    return load_transformers_model(folder, ModelConfig.from_folder(folder), device=CPU, dtype=dtype)


@cache
def models(name: str) -> tuple[PreTrainedModel, TransformersModel]:
    with TemporaryDirectory() as folder:
        original = write(Path(folder), *SUPPORTED[name])
        return original, load(Path(folder))


def text(length: int, seed: int) -> list[int]:
    generator = torch.Generator().manual_seed(seed)
    ids: list[int] = torch.randint(3, VOCABULARY, (length,), generator=generator).tolist()
    return ids


@torch.no_grad()
def expected(model: PreTrainedModel, ids: list[int]) -> torch.Tensor:
    logits: torch.Tensor = model(torch.tensor([ids]), use_cache=False).logits[0]
    return logits


def assert_equal(found: torch.Tensor, wanted: torch.Tensor) -> None:
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, wanted, rtol=0, atol=1e-4)


@pytest.mark.parametrize("name", SUPPORTED)
def test_prefill_chunks_and_decodes_of_a_batch_give_the_logits_of_transformers(name: str) -> None:
    original, model = models(name)
    assert not model.config.fused
    ids = {"a": text(40, seed=1), "b": text(23, seed=2)}
    wanted = {sequence: expected(original, tokens) for sequence, tokens in ids.items()}
    assert wanted["a"].std() > 0.1  # the comparison below means something

    assert_equal(PagedRun(model).step({"a": ids["a"]})["a"], wanted["a"])

    run = PagedRun(model)
    done = dict.fromkeys(ids, 0)
    for step in ({"a": 17}, {"a": 1, "b": 9}, {"b": 1, "a": 1}, {"a": 12, "b": 12}, {"b": 1}, {"a": 9}):
        pieces = {sequence: ids[sequence][done[sequence] : done[sequence] + count] for sequence, count in step.items()}
        for sequence, logits in run.step(pieces).items():
            start = done[sequence]
            done[sequence] += step[sequence]
            assert_equal(logits, wanted[sequence][start : done[sequence]])
    assert done == {sequence: len(tokens) for sequence, tokens in ids.items()}


@pytest.mark.parametrize("name", ["gpt_neox", "gemma3 window"])
def test_a_prefix_in_the_pages_of_another_sequence(name: str) -> None:
    original, model = models(name)
    ids = text(30, seed=3)
    run = PagedRun(model)
    run.step({"a": ids})
    run.share("a", "b", 20)
    other = ids[:20] + text(6, seed=4)
    assert_equal(run.step({"b": other[20:]})["b"], expected(original, other)[20:])


def test_logits_of_the_rows_asked_for_only() -> None:
    original, model = models("phi")
    ids = text(12, seed=5)
    run = PagedRun(model)
    assert run.step({"a": ids[:8]}, logits=0)["a"].shape == (0, VOCABULARY)
    assert_equal(run.step({"a": ids[8:]}, logits=1)["a"], expected(original, ids)[-1:])


def test_context_ends_where_longrope_would_change_the_frequencies() -> None:
    _, model = models("phi3 longrope")
    assert model.config.context_length == 64


def test_bfloat16(tmp_path: Path) -> None:
    original = write(tmp_path, *SUPPORTED["olmo2"])
    model = load(tmp_path, "bfloat16")
    assert model.dtype == torch.bfloat16
    ids = text(20, seed=6)
    logits = PagedRun(model).step({"a": ids})["a"]
    wanted = expected(original, ids)
    assert logits.dtype == torch.float32
    assert (logits - wanted).norm() < 0.05 * wanted.norm()


def test_two_threads_run_one_model() -> None:
    original, model = models("qwen3_moe")

    def generate(seed: int) -> None:
        ids = text(25, seed=seed)
        run = PagedRun(model)
        logits = [run.step({"a": ids[:10]})["a"], *(run.step({"a": [token]})["a"] for token in ids[10:])]
        assert_equal(torch.cat(logits), expected(original, ids))

    with ThreadPoolExecutor(2) as pool:
        list(pool.map(generate, [7, 8]))


REFUSED: dict[str, tuple[str, dict[str, Any], str]] = {
    "softcap": ("gemma2", HEADS | {"head_dim": 8}, "soft-capped"),
    "sinks": ("gpt_oss", HEADS | {"head_dim": 8, "num_local_experts": 4, "sliding_window": 5}, "attention sinks"),
    "MLA": (
        "deepseek_v3",
        {"num_attention_heads": 4, "q_lora_rank": 8, "kv_lora_rank": 8, "qk_nope_head_dim": 8, "qk_rope_head_dim": 8}
        | {"v_head_dim": 8, "n_routed_experts": 4, "n_group": 1, "topk_group": 1, "first_k_dense_replace": 2},
        "layer 0 attends with Q, K and V of the shapes",
    ),
    "not causal": ("bert", {"num_attention_heads": 4}, "its logits are not those of its own attention"),
    "old attention classes": ("gptj", {"n_embd": 32, "n_layer": 2, "n_head": 4, "rotary_dim": 4}, "interface"),
    "attention not pluggable": ("codegen", {"n_embd": 32, "n_layer": 2, "n_head": 4, "rotary_dim": 4}, "layers \\[\\]"),
    "several attentions in a layer": ("diffllama", HEADS, "layers \\[0, 0, 1, 1\\]"),
    "window that the code ignores": ("phimoe", HEADS | {"num_local_experts": 4, "sliding_window": 5}, "window None"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refuses_what_would_go_wrong(case: str, tmp_path: Path) -> None:
    model_type, fields, message = REFUSED[case]
    original = write(tmp_path, model_type, fields)
    with pytest.raises(UnsupportedModel, match=message) as caught:
        load(tmp_path)
    assert type(original).__name__ in str(caught.value)


def drop(tensors: dict[str, torch.Tensor], name: str) -> None:
    del tensors[name]


def add(tensors: dict[str, torch.Tensor], name: str) -> None:
    tensors["model.layers.0.surprise.weight"] = torch.zeros(2)


def cut(tensors: dict[str, torch.Tensor], name: str) -> None:
    tensors[name] = tensors[name][:-1].clone()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (drop, "missing: model.layers.1.mlp.down_proj.weight"),
        (add, "unexpected: model.layers.0.surprise.weight"),
        (cut, "of the wrong shape: model.layers.1.mlp.down_proj.weight is \\[31, 48\\], not \\[32, 48\\]"),
    ],
)
def test_names_the_tensors_that_do_not_fit(
    change: Callable[[dict[str, torch.Tensor], str], None], message: str, tmp_path: Path
) -> None:
    write(tmp_path, *SUPPORTED["olmo2"])
    tensors = load_file(tmp_path / "model.safetensors")
    change(tensors, "model.layers.1.mlp.down_proj.weight")
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=message):
        load(tmp_path)


def test_never_runs_code_from_the_checkpoint(tmp_path: Path) -> None:
    write(tmp_path, *SUPPORTED["olmo2"])
    fields = json.loads((tmp_path / "config.json").read_text())
    fields["auto_map"] = {"AutoConfig": "own.Config", "AutoModelForCausalLM": "own.Model"}
    (tmp_path / "config.json").write_text(json.dumps(fields))
    (tmp_path / "own.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')")
    assert load(tmp_path).config.architecture == "Olmo2ForCausalLM"
    assert not (tmp_path / "ran").exists()
