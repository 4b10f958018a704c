"""The fused decoder against transformers on the same checkpoint: same logits, however the tokens arrive."""

from __future__ import annotations

import threading
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest
import torch
from checkpoints import VOCABULARY, write_checkpoint
from hypothesis import given, settings
from hypothesis import strategies as st
from paged_run import PagedRun
from transformers import PreTrainedModel

from preble.engine.config import ModelConfig
from preble.engine.decoder import Decoder, load_decoder

CPU = torch.device("cpu")
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 500.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
LONGROPE = {
    "rope_type": "longrope",
    "short_factor": [1.0, 1.1, 1.3, 1.9],
    "long_factor": [1.0, 2.0, 4.0, 9.0],
    "original_max_position_embeddings": 64,
    "factor": 4.0,
}

CHECKPOINTS: dict[str, dict[str, Any]] = {
    "llama": {},
    "llama tied": {"tie_word_embeddings": True},
    "llama biases": {"attention_bias": True, "mlp_bias": True},
    "llama heads wider than hidden": {"head_dim": 16},
    "llama one kv head": {"num_key_value_heads": 1},
    "llama no groups": {"num_key_value_heads": 4},
    "llama sharded": {"max_shard_size": "10KB"},
    "llama large eps": {"rms_norm_eps": 0.1},
    "llama linear": {"rope_parameters": {"rope_type": "linear", "factor": 4.0}},
    "llama dynamic": {"rope_parameters": {"rope_type": "dynamic", "factor": 2.0}, "max_position_embeddings": 64},
    "llama llama3": {"rope_parameters": LLAMA3},
    "llama longrope": {"rope_parameters": LONGROPE},
    "mistral": {"sliding_window": None},
    "mistral window": {"sliding_window": 5},
    "qwen2": {},
    "qwen2 tied": {"tie_word_embeddings": True},
    "qwen2 window in some layers": {"use_sliding_window": True, "sliding_window": 7, "max_window_layers": 1},
    "qwen2 yarn": {
        "rope_parameters": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64},
    },
    "qwen3": {},
    "qwen3 biases": {"attention_bias": True},
    "qwen3 yarn": {
        "rope_parameters": {
            "rope_type": "yarn",
            "factor": 4.0,
            "beta_fast": 16.0,
            "attention_factor": 1.5,
            "truncate": False,
            "original_max_position_embeddings": 64,
        },
    },
}


def load(folder: Path, dtype: str = "float32") -> Decoder:
    return load_decoder(folder, ModelConfig.from_folder(folder), device=CPU, dtype=dtype)


@cache
def models(name: str) -> tuple[PreTrainedModel, Decoder]:
    with TemporaryDirectory() as folder:
        reference = write_checkpoint(Path(folder), name.split()[0], **CHECKPOINTS[name])
        return reference, load(Path(folder))


def tokens(count: int, seed: int = 0) -> list[int]:
    return torch.randint(VOCABULARY, (count,), generator=torch.Generator().manual_seed(seed)).tolist()


@torch.inference_mode()
def expected(model: PreTrainedModel, token_ids: list[int]) -> torch.Tensor:
    return model(torch.tensor([token_ids])).logits[0].float()


def assert_same(actual: torch.Tensor, wanted: torch.Tensor) -> None:
    assert actual.dtype == torch.float32
    torch.testing.assert_close(actual, wanted, atol=1e-4, rtol=0)


@pytest.mark.parametrize("name", CHECKPOINTS)
def test_prefill(name: str) -> None:
    reference, decoder = models(name)
    prompt = tokens(64)  # as far as the shortest context (dynamic, longrope) reaches
    assert decoder.config.context_length >= len(prompt)
    assert_same(PagedRun(decoder).step({"a": prompt})["a"], expected(reference, prompt))


@pytest.mark.parametrize("name", CHECKPOINTS)
def test_chunked_prefill_then_decode_token_by_token(name: str) -> None:
    reference, decoder = models(name)
    sequence = tokens(40, seed=1)
    run = PagedRun(decoder, page_size=3)
    chunks = [sequence[:1], sequence[1:14], sequence[14:29], *([token] for token in sequence[29:])]
    logits = torch.cat([run.step({"a": chunk})["a"] for chunk in chunks])
    assert_same(logits, expected(reference, sequence))


@settings(deadline=None, max_examples=25)
@given(
    name=st.sampled_from(["llama", "mistral window", "qwen2 window in some layers", "qwen3"]),
    page_size=st.sampled_from([1, 3, 16]),
    lengths=st.lists(st.integers(1, 24), min_size=1, max_size=4),
    data=st.data(),
)
def test_batches_with_chunk_boundaries_anywhere(
    name: str, page_size: int, lengths: list[int], data: st.DataObject
) -> None:
    """Sequences start, pause and end at different times, and prefills share a pass with decodes."""
    reference, decoder = models(name)
    run = PagedRun(decoder, page_size=page_size, seed=len(lengths))
    left = {f"s{number}": tokens(length, seed=number) for number, length in enumerate(lengths)}
    wanted = {sequence: expected(reference, token_ids) for sequence, token_ids in left.items()}
    done = dict.fromkeys(left, 0)
    while left:
        step: dict[str, list[int]] = {}
        for sequence in data.draw(st.sets(st.sampled_from(sorted(left)), min_size=1)):
            count = data.draw(st.integers(1, len(left[sequence])))
            step[sequence], left[sequence] = left[sequence][:count], left[sequence][count:]
        left = {sequence: rest for sequence, rest in left.items() if rest}
        for sequence, logits in run.step(step).items():
            start, done[sequence] = done[sequence], done[sequence] + len(logits)
            assert_same(logits, wanted[sequence][start : done[sequence]])


def test_logits_only_of_the_rows_asked_for() -> None:
    reference, decoder = models("qwen3")
    run = PagedRun(decoder)
    first, second = tokens(9), tokens(17, seed=3)
    silent = run.step({"a": first[:5], "b": second[:4]}, logits=0)
    assert [tuple(logits.shape) for logits in silent.values()] == [(0, VOCABULARY)] * 2
    last = run.step({"a": first[5:], "b": second[4:]}, logits=1)
    assert_same(last["a"], expected(reference, first)[-1:])
    assert_same(last["b"], expected(reference, second)[-1:])


def test_a_sequence_may_read_pages_that_another_wrote() -> None:
    """The KV of a prefix does not depend on what follows, also where positions are scaled."""
    reference, decoder = models("llama longrope")
    run = PagedRun(decoder, page_size=4)
    prefix = tokens(16)
    run.step({"a": prefix + tokens(30, seed=5)})
    run.share("a", "b", len(prefix))
    continuation = tokens(11, seed=6)
    assert_same(run.step({"b": continuation})["b"], expected(reference, prefix + continuation)[len(prefix) :])


def test_threads_share_one_decoder() -> None:
    reference, decoder = models("mistral window")
    prompts = [tokens(30, seed=seed) for seed in range(4)]
    results: dict[int, torch.Tensor] = {}

    def replica(number: int) -> None:
        run = PagedRun(decoder, seed=number)
        results[number] = torch.cat([run.step({"a": prompts[number][at : at + 2]})["a"] for at in range(0, 30, 2)])

    threads = [threading.Thread(target=replica, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for number, prompt in enumerate(prompts):
        assert_same(results[number], expected(reference, prompt))


@pytest.mark.parametrize("name", ["llama", "llama tied", "qwen2", "qwen3", "mistral window"])
def test_bf16_is_as_close_to_exact_as_transformers(tmp_path: Path, name: str) -> None:
    reference = write_checkpoint(tmp_path, name.split()[0], dtype=torch.bfloat16, **CHECKPOINTS[name])
    prompt = tokens(40)
    theirs = expected(reference, prompt)
    exact = expected(reference.float(), prompt)
    decoder = load(tmp_path, "bfloat16")
    ours = PagedRun(decoder).step({"a": prompt})["a"]
    assert (ours - exact).abs().mean() < 1.1 * (theirs - exact).abs().mean()


def test_weights_are_converted_to_the_dtype_asked_for(tmp_path: Path) -> None:
    reference = write_checkpoint(tmp_path, dtype=torch.bfloat16, tie_word_embeddings=True)
    prompt = tokens(20)
    assert_same(PagedRun(load(tmp_path)).step({"a": prompt})["a"], expected(reference.float(), prompt))


def test_half_precision_without_packed_weights(tmp_path: Path) -> None:
    reference = write_checkpoint(tmp_path, "qwen2", dtype=torch.float16, tie_word_embeddings=True)
    prompt = tokens(20)
    ours = PagedRun(load(tmp_path, "float16")).step({"a": prompt})["a"]
    torch.testing.assert_close(ours, expected(reference.float(), prompt), atol=0.05, rtol=0)
