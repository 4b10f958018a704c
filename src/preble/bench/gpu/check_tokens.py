"""The engine on the device against the engine on the CPU: the same greedy tokens in fp32, however steps are run."""

from __future__ import annotations

import gc
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from preble.bench.gpu.place import Place
from preble.bench.gpu.random_model import GREEDY, PAGE, Driver, make_runner, random_prompts
from preble.bench.gpu.record import Record
from preble.engine.checkpoint import Checkpoint
from preble.engine.config import ModelConfig
from preble.engine.decoder_weights import DecoderWeights
from preble.engine.device.runner import DeviceRunner
from preble.engine.host_runner import HostRunner
from preble.engine.loading import load_model
from preble.engine.tokenizer import Tokenizer
from preble.kernels.prefix_groups import SharedPrefixes
from preble.sched.hashing import Tokens
from preble.sched.step_plan import Chunk

VOCABULARY = 512
BUDGET, RUNNING = 96, 8
"""Small, so that prompts are cut into chunks and requests wait for each other."""
TOKENS = 16 * 1024
"""Of KV: plenty."""
PREEMPT_EVERY = 5
"""Steps."""
LONG_PREFIX = 80
"""Pages: from somewhat fewer on, reading them once for eight requests pays even for these models."""
NEAR_TIE = 1e-4
"""Logits no further apart than this may be ordered either way in fp32."""
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {},
    "qwen3": {},
    "mistral": {"sliding_window": 100},
}


@dataclass(frozen=True, slots=True)
class Way:
    """How the engine on the device runs."""

    name: str
    capture: bool = True
    ahead: int = 1
    preempt: bool = False
    """Whether running requests are sent back to the queue again and again."""
    new_tokens: int = 24
    logprobs: int | None = None
    """With these the host samples, and requests run in lockstep."""


WAYS = (
    Way("launch by launch", capture=False, ahead=0),
    Way("one step ahead", capture=False),
    Way("CUDA graphs", ahead=0),
    Way("CUDA graphs, one step ahead"),
    Way("preempted", preempt=True),
    Way("sampled on the host", logprobs=1),
)


def run_tokens(place: Place, record: Record, shard: tuple[int, int]) -> None:
    """Models of two layers that transformers writes: plain heads, normed heads, a sliding window."""
    first, step = shard
    for family in list(FAMILIES)[first::step][: 1 if place.toy else None]:
        with tempfile.TemporaryDirectory(prefix="preble-bench-") as folder:
            path = write_small_checkpoint(Path(folder), family)
            _check_family(place, record, family, path)


def _check_family(place: Place, record: Record, family: str, folder: Path) -> None:
    torch.set_num_threads(1)
    tokenizer = Tokenizer(folder)
    waves = _waves(place)
    model = load_model(folder, device=torch.device("cpu"), dtype="float32")
    wanted: list[list[int]] = []
    config = ModelConfig.from_folder(folder)
    weights = DecoderWeights.load(config, Checkpoint(folder), device=place.device, dtype=torch.float32)
    for way in (WAYS[1], WAYS[4]) if place.toy else WAYS:
        way = replace(way, new_tokens=way.new_tokens // 6) if place.toy else way
        name = f"tokens of {family}, {way.name}"
        try:
            if not wanted:
                host = HostRunner(model, pages=TOKENS // PAGE, page_size=PAGE)
                wanted, _ = _generate(host, tokenizer, waves, replace(way, preempt=False))
            gc.collect()
            runner = make_runner(
                place,
                config,
                weights,
                tokens=TOKENS,
                max_running=RUNNING,
                max_batched_tokens=BUDGET,
                capture=way.capture,
                ahead=way.ahead,
                dtype=torch.float32,
            )
            shared_steps = _count_shared(runner)
            got, driver = _generate(runner, tokenizer, waves, way)
            _compare(record, name, model_of=(folder, waves), got=got, wanted=wanted)
            scheduler = driver.engine.scheduler
            record.check(f"{name}: prefixes are reused", float(scheduler.cached_tokens == 0), 0.0)
            if way.preempt:
                record.check(f"{name}: requests are preempted", float(scheduler.preemptions == 0), 0.0)
            if family != "mistral" and not place.toy:  # whose layers all have a window
                record.check(f"{name}: prefixes are shared", float(not shared_steps), 0.0, steps=len(shared_steps))
        except Exception as error:  # the other ways still tell something, unless the context is lost
            record.failed_check(name, error)
            if "CUDA error" in str(error):
                raise
    record.say(f"tokens of {family} checked")


def _count_shared(runner: DeviceRunner) -> list[object]:
    """Gets what every step from now on shares, where it shares anything."""
    found: list[object] = []
    find = runner._sharing.find

    def counted(chunks: list[Chunk], size: int) -> SharedPrefixes | None:
        shared = find(chunks, size)
        found.extend([] if shared is None else [shared])
        return shared

    setattr(runner._sharing, "find", counted)  # noqa: B010 (a method, as mypy sees it)
    return found


def _waves(place: Place) -> list[list[Tokens]]:
    """Prompts that come one after the other: of all lengths, on a common prefix, on a long one, and old ones again."""
    ragged = [random_prompts(1, length, VOCABULARY, length)[0] for length in (1, 2, 64, 65, 200, 333)]
    (prefix,) = random_prompts(1, 5 * PAGE, VOCABULARY, 0)
    tails = [random_prompts(1, length, VOCABULARY, 1000 + length)[0] for length in (1, 7, 30, 64, 70, 3)]
    shared = [np.concatenate([prefix, tail]) for tail in tails]
    waves = [ragged, shared, [*shared[:3], ragged[4], ragged[5]]]
    if place.toy:
        return waves
    (long_prefix,) = random_prompts(1, LONG_PREFIX * PAGE, VOCABULARY, 1)
    return [*waves, [np.concatenate([long_prefix, tail]) for tail in [*tails, *ragged[:2]]]]


def _generate(
    runner: HostRunner | DeviceRunner, tokenizer: Tokenizer, waves: Sequence[Sequence[Tokens]], way: Way
) -> tuple[list[list[int]], Driver]:
    driver = Driver.make(runner, tokenizer, max_running=RUNNING, max_batched_tokens=BUDGET)
    for wave in waves:
        driver.submit(wave, way.new_tokens, replace(GREEDY, logprobs=way.logprobs))
        steps = 0
        while driver.engine.has_work:
            driver.step()
            steps += 1
            running = driver.engine.scheduler.running
            if way.preempt and running and steps % PREEMPT_EVERY == 0:
                driver.engine.scheduler.preempt(running[-1].request_id)
    return list(driver.outputs.values()), driver


def _compare(
    record: Record,
    name: str,
    *,
    model_of: tuple[Path, list[list[Tokens]]],
    got: list[list[int]],
    wanted: list[list[int]],
) -> None:
    """Requests must agree up to a near tie of the CPU's logits, behind which two texts are both right."""
    folder, waves = model_of
    prompts = [prompt for wave in waves for prompt in wave]
    wrong = ties = 0
    for prompt, ours, theirs in zip(prompts, got, wanted, strict=True):
        if ours == theirs:
            continue
        agreed = next((at for at, pair in enumerate(zip(ours, theirs, strict=False)) if pair[0] != pair[1]), None)
        if agreed is not None and _gap(folder, [*prompt.tolist(), *theirs[:agreed]]) < NEAR_TIE:
            ties += 1
        else:
            wrong += 1
    record.check(name, float(wrong), 0.0, requests=len(got), near_ties=ties)


def _gap(folder: Path, tokens: list[int]) -> float:
    """How far the best token's logit lies above the second best's, after `tokens`, as transformers computes it."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    with torch.inference_mode():
        best = model(torch.tensor([tokens])).logits[0, -1].topk(2).values
    return float(best[0] - best[1])


def write_small_checkpoint(folder: Path, family: str) -> Path:
    """A checkpoint of two small layers with heads of 64, written by transformers; every weight is random."""
    from transformers import AutoConfig, AutoModelForCausalLM

    from_config: Any = AutoModelForCausalLM.from_config
    config = AutoConfig.for_model(
        family,
        vocab_size=VOCABULARY,
        hidden_size=128,
        intermediate_size=192,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=64,
        max_position_embeddings=8192,
        tie_word_embeddings=False,
        bos_token_id=None,
        eos_token_id=None,
        **FAMILIES[family],
    )
    model = from_config(config, dtype=torch.float32)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.copy_(1 + 0.3 * noise if "norm" in name else noise * parameter.shape[-1] ** -0.5)
    model.save_pretrained(folder)
    write_byte_tokenizer(folder)
    return folder


def write_byte_tokenizer(folder: Path) -> None:
    """One token per byte."""
    from tokenizers import Tokenizer as RustTokenizer
    from tokenizers import decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = RustTokenizer(models.BPE(vocab={symbol: number for number, symbol in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    fast: Any = PreTrainedTokenizerFast
    fast(tokenizer_object=tokenizer).save_pretrained(folder)
