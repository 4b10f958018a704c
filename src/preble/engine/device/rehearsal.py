"""Forward passes over nothing: to compile kernels, to see how much memory they take and how large K and V are."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import torch

from preble.engine.config import ModelConfig
from preble.engine.device.attention import Attention
from preble.engine.device.batch import DecodeInputs, DeviceBatch, DeviceModel, ExtendInputs
from preble.engine.device.runner import DeviceRunner
from preble.engine.kv_cache import KVCache
from preble.engine.sampler import SamplingState
from preble.kernels.architecture import architecture_of
from preble.kernels.paged_extend import extend_tiles, tile_tokens
from preble.sampling import SamplingParams
from preble.sched.block_table import BlockTable
from preble.sched.sequence import Sequence
from preble.sched.step_plan import Chunk, StepPlan

CALIBRATION_TOKENS = 512
LARGEST_E4M3 = 448.0
HEADROOM = 2.0
"""K and V may become this many times as large as in the calibration before they are clipped."""


def extend_batch(
    config: ModelConfig,
    tokens: int,
    *,
    decodes: int,
    logits: int,
    stored: bool,
    device: torch.device,
    dtype: torch.dtype,
) -> DeviceBatch:
    """`decodes` requests with a token each and one or more with `tokens` in all, random ones; so many rows of logits.

    With `stored`, a single request of `tokens` tokens lies in slots 0 onwards; else nothing is stored, and everybody
    reads page 0. The page table is of pages 0, 1, ….
    """
    generator = np.random.default_rng(0)
    longest = min(config.context_length, tokens)
    lengths = np.array([longest] * (tokens // longest) + ([tokens % longest] if tokens % longest else []), np.int32)
    total = decodes + tokens
    positions = np.concatenate([np.zeros(decodes, np.int32), *(np.arange(n, dtype=np.int32) for n in lengths)])
    heads = {"query_heads": config.query_heads, "kv_heads": config.kv_heads, "head_dim": config.head_dim}
    tile = tile_tokens(architecture_of(device), **heads, dtype=dtype)

    def there(values: np.ndarray) -> torch.Tensor:
        return torch.from_numpy(np.ascontiguousarray(values, np.int32)).to(device)

    slots = np.arange(total) - decodes if stored else np.full(total, -1)
    pages = longest // 16 + 1  # as many as the smallest pages make
    return DeviceBatch(
        token_ids=there(generator.integers(config.vocabulary_size, size=total)),
        positions=there(positions),
        slots=there(np.maximum(slots, -1)),
        tables=there(np.arange(pages)[None] if stored else np.zeros((1, pages))),
        decodes=DecodeInputs(there(np.zeros(decodes)), there(np.ones(decodes))) if decodes else None,
        extends=ExtendInputs(
            rows=there(np.zeros(len(lengths))),
            context_lengths=there(lengths),
            query_starts=there(np.concatenate([[0], lengths.cumsum()])),
            tiles=there(extend_tiles(lengths, lengths, tile)),
            longest=longest,
            longest_context=longest,
        ),
        logit_rows=there(np.arange(max(total - logits, 0), total)),
    )


def calibrate(model: DeviceModel, attention: Attention, page_size: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Scales of an fp8 cache, fp32 [layers, kv_heads] each for K and V: from what random tokens give, with headroom.

    The same model gives the same scales, so that replicas agree on what a page says.
    """
    config, device = model.config, model.device
    tokens = min(CALIBRATION_TOKENS, config.context_length)
    kv = KVCache(
        layers=config.layers,
        pages=-(-tokens // page_size),
        page_size=page_size,
        kv_heads=config.kv_heads,
        head_dim=config.head_dim,
        dtype=model.dtype,
        device=device,
    )
    batch = extend_batch(config, tokens, decodes=0, logits=1, stored=True, device=device, dtype=model.dtype)
    model.forward(batch, kv, attention)
    scales = [
        (part[:, :tokens].abs().amax((1, 3)).float() * (HEADROOM / LARGEST_E4M3)).clamp_(min=1e-8)
        for part in (kv.keys, kv.values)
    ]
    return scales[0], scales[1]


def warm_up(runner: DeviceRunner) -> None:
    """Run a short request through everything, so that nothing is compiled when the first real one comes.

    It uses the first pages, which nobody has yet.
    """
    room = min(runner.pages * runner.page_size, runner.config.context_length)
    prompt = np.zeros(max(min(room - 1, runner.max_batched_tokens, 17), 1), np.int32)
    params = SamplingParams(temperature=1.0, top_p=0.9, repetition_penalty=1.1)
    state = SamplingState(params, 0, prompt, runner.config.vocabulary_size, frozenset())
    sequence = Sequence(
        "", prompt, prompt_length=len(prompt), max_length=len(prompt) + 1, payload=SimpleNamespace(sampling=state)
    )
    sequence.table = BlockTable(range(-(-(len(prompt) + 1) // runner.page_size)))
    runner.launch(StepPlan([Chunk(sequence, 0, len(prompt), True)], len(prompt))).result()
    if len(prompt) < room:
        sequence.append(0)
        runner.launch(StepPlan([Chunk(sequence, len(prompt), 1, True)], 1)).result()
