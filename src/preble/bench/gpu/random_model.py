"""Models with random weights, made on the device, and engines that run them."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import torch

from preble.bench.gpu.place import Place
from preble.bench.shapes import Shape, write_checkpoint
from preble.engine.config import ModelConfig
from preble.engine.decoder_weights import DecoderWeights, LayerWeights
from preble.engine.device.decoder import DeviceDecoder
from preble.engine.device.kernel_attention import KernelAttention
from preble.engine.device.queue import Queue
from preble.engine.device.runner import DeviceRunner
from preble.engine.engine import Engine
from preble.engine.kv_cache import KVCache
from preble.engine.linear import Linear
from preble.engine.messages import Submit
from preble.engine.norm import RMSNorm
from preble.engine.rope_config import RopeConfig
from preble.engine.runner import Runner
from preble.engine.tokenizer import Tokenizer
from preble.sampling import SamplingParams
from preble.sched.hashing import Tokens

LLAMA_8B = Shape("llama-3-8b", 4096, 32, heads=32, kv_heads=8, intermediate=14_336, vocabulary=128_256, tied=False)
LLAMA_1B = Shape("llama-3.2-1b", 2048, 16, heads=32, kv_heads=8, intermediate=8192, vocabulary=128_256, tied=True)
TOY = Shape("toy", 256, 2, heads=4, kv_heads=2, intermediate=256, vocabulary=1000, tied=False)
PAGE = 64
EPS = 1e-5
ROPE_THETA = 500_000.0
GREEDY = SamplingParams(temperature=0.0, ignore_eos=True)


def model_config(shape: Shape, context: int) -> ModelConfig:
    """What config.json would say of a Llama of this shape."""
    parameters = {"rope_type": "default", "rope_theta": ROPE_THETA}
    return ModelConfig(
        architecture="LlamaForCausalLM",
        vocabulary_size=shape.vocabulary,
        hidden_size=shape.hidden,
        intermediate_size=shape.intermediate,
        layers=shape.layers,
        query_heads=shape.heads,
        kv_heads=shape.kv_heads,
        head_dim=shape.head_dim,
        context_length=context,
        layer_windows=(None,) * shape.layers,
        eos_token_ids=frozenset(),
        dtype="bfloat16",
        fused=True,
        rms_norm_eps=EPS,
        tied_embeddings=shape.tied,
        rope=RopeConfig("default", ROPE_THETA, context, parameters),
    )


def random_weights(place: Place, shape: Shape) -> DecoderWeights:
    """Normal, with the deviation that keeps activations of order one."""
    generator = place.generator(0)

    def matrix(rows: int, columns: int) -> torch.Tensor:
        empty = torch.empty(rows, columns, dtype=place.dtype, device=place.device)
        return empty.normal_(0, columns**-0.5, generator=generator)

    def norm() -> RMSNorm:
        return RMSNorm(torch.ones(shape.hidden, dtype=place.dtype, device=place.device), EPS)

    heads = shape.heads + 2 * shape.kv_heads
    layers = tuple(
        LayerWeights(
            attention_norm=norm(),
            qkv=Linear(matrix(heads * shape.head_dim, shape.hidden)),
            qk_norm=None,
            output=Linear(matrix(shape.hidden, shape.heads * shape.head_dim)),
            mlp_norm=norm(),
            gate_up=Linear(matrix(2 * shape.intermediate, shape.hidden)),
            down=Linear(matrix(shape.hidden, shape.intermediate)),
        )
        for _ in range(shape.layers)
    )
    embedding = matrix(shape.vocabulary, shape.hidden)
    head = Linear(embedding if shape.tied else matrix(shape.vocabulary, shape.hidden))
    return DecoderWeights(embedding, layers, norm(), head)


def read_bytes(shape: Shape, place: Place) -> int:
    """Bytes of weights that a decode step reads: all but the rows of the embedding that nobody asks for."""
    weights = shape.parameters - (0 if shape.tied else shape.vocabulary * shape.hidden)
    return weights * place.dtype.itemsize


def token_bytes(shape: Shape, place: Place) -> int:
    """Bytes of K and V of a token over all layers."""
    return KVCache.bytes_per_page(
        layers=shape.layers, page_size=1, kv_heads=shape.kv_heads, head_dim=shape.head_dim, dtype=place.dtype
    )


def make_runner(
    place: Place,
    config: ModelConfig,
    weights: DecoderWeights,
    *,
    tokens: int,
    max_running: int,
    max_batched_tokens: int,
    capture: bool = True,
    ahead: int = 1,
    dtype: torch.dtype | None = None,
    queue: Queue | None = None,
) -> DeviceRunner:
    """A runner with KV for `tokens` tokens, its CUDA graphs captured if `capture`."""
    dtype = place.dtype if dtype is None else dtype
    max_running = min(max_running, max_batched_tokens)
    kv = KVCache(
        layers=config.layers,
        pages=-(-tokens // PAGE),
        page_size=PAGE,
        kv_heads=config.kv_heads,
        head_dim=config.head_dim,
        dtype=dtype,
        device=place.device,
    )
    runner = DeviceRunner(
        DeviceDecoder(config, weights, place.operations, device=place.device, dtype=dtype),
        operations=place.operations,
        attention=KernelAttention(
            config,
            operations=place.operations,
            dtype=dtype,
            device=place.device,
            page_size=PAGE,
            max_decodes=max_running,
        ),
        kv=kv,
        max_running=max_running,
        max_batched_tokens=max_batched_tokens,
        ahead=ahead,
        queue=queue,
    )
    place.synchronize()  # the runner has a queue of its own, the weights came by another
    if capture:
        runner.capture()
    return runner


def make_checkpoint(shape: Shape, folder: Path, context: int) -> Path:
    """Write a checkpoint with tokenizer and random weights for texts of up to `context` tokens."""
    folder.mkdir(parents=True, exist_ok=True)
    write_checkpoint(shape, folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"max_position_embeddings": context}))
    return folder


def make_tokenizer(shape: Shape, folder: Path) -> Tokenizer:
    """A tokenizer that has a text for every token of the shape."""
    return Tokenizer(make_checkpoint(replace(shape, layers=0, hidden=shape.heads), folder, context=1))


@dataclass(slots=True)
class Driver:
    """An engine and the requests that were given to it."""

    engine: Engine
    outputs: dict[str, list[int]] = field(default_factory=dict)

    @classmethod
    def make(cls, runner: Runner, tokenizer: Tokenizer, *, max_running: int, max_batched_tokens: int) -> Driver:
        """Around a runner, whose KV pages the engine takes for empty."""
        return cls(Engine(runner, tokenizer, max_running=max_running, max_batched_tokens=max_batched_tokens))

    def submit(self, prompts: Sequence[Tokens], new_tokens: int, sampling: SamplingParams = GREEDY) -> list[str]:
        """Queue prompts that all generate exactly `new_tokens`; returns their ids."""
        names = [f"request {len(self.outputs) + number}" for number in range(len(prompts))]
        for name, prompt in zip(names, prompts, strict=True):
            self.outputs[name] = []
            self.engine.submit(
                Submit(name, prompt, len(prompt), len(prompt) + new_tokens, replace(sampling, max_tokens=new_tokens), 0)
            )
        return names

    def step(self) -> int:
        """One step; how many tokens came back.

        Raises RuntimeError if a request failed.
        """
        came = 0
        for delta in self.engine.step().deltas:
            if delta.error is not None:
                raise RuntimeError(f"{delta.request_id} failed: {delta.error}")
            self.outputs[delta.request_id] += delta.token_ids
            came += len(delta.token_ids)
        return came

    def finish(self) -> None:
        """Step until nothing is left to do."""
        while self.engine.has_work:
            self.step()


def random_prompts(count: int, length: int, vocabulary: int, seed: int) -> list[Tokens]:
    """`count` prompts of `length` tokens with nothing in common, int32."""
    numbers = np.random.default_rng(seed).integers(vocabulary, size=(count, length), dtype=np.int32)
    return list(numbers)
