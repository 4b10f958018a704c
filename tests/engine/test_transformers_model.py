"""Architectures outside the fused decoder: transformers' code over our paged cache gives transformers' logits."""

from __future__ import annotations

import json
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
import torch
from other_checkpoints import REFUSED, SUPPORTED, VOCABULARY, write
from paged_run import PagedRun
from safetensors.torch import load_file, save_file
from transformers import PreTrainedModel

from preble.engine.config import ModelConfig
from preble.engine.transformers_model import TransformersModel, load_transformers_model
from preble.errors import CheckpointError, UnsupportedModel

CPU = torch.device("cpu")


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


def test_a_window_as_long_as_the_context_is_none(tmp_path: Path) -> None:
    write(tmp_path, "starcoder2", SUPPORTED["starcoder2 window"][1] | {"sliding_window": 128})
    assert load(tmp_path).config.layer_windows == (None, None)


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
