"""Preble's engine beside transformers' continuous batching: same weights, same GPU, same prompts, in turns."""

from __future__ import annotations

import dataclasses
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from preble.bench.gpu.place import Place
from preble.bench.gpu.predictions import PEER
from preble.bench.gpu.random_model import (
    EPS,
    LLAMA_8B,
    ROPE_THETA,
    TOY,
    Driver,
    make_runner,
    make_tokenizer,
    model_config,
    random_prompts,
)
from preble.bench.gpu.record import Record
from preble.bench.shapes import Shape
from preble.engine.decoder_weights import DecoderWeights, LayerWeights
from preble.engine.linear import Linear
from preble.engine.norm import RMSNorm
from preble.sched.hashing import Tokens

REQUESTS, PROMPT, NEW = 64, 512, 128
ROUNDS = 3
BUDGET = 8192
SETTINGS: tuple[dict[str, Any], ...] = ({}, {"use_cuda_graph": True})
"""Of the peer; the fastest in a first round goes on. Attention is flash-attn where transformers finds it, else SDPA."""
SECONDS_TO_CHOOSE = 45.0
"""After the part began, no further settings are tried."""
SHARE_OF_MEMORY = 0.6
"""Of what is left, for the peer's pages: twice what these requests need."""


def run_peer(place: Place, record: Record, shard: tuple[int, int]) -> None:
    """Tokens per second from the first prompt handed over to the last token."""
    shape = TOY if place.toy else LLAMA_8B
    until = time.monotonic() + SECONDS_TO_CHOOSE
    requests, prompt, new = (3, 20, 4) if place.toy else (REQUESTS, PROMPT, NEW)
    model = make_model(place, shape, 2 * (prompt + new))
    record.note("transformers", _versions())
    config = model_config(shape, 2 * (prompt + new))
    runner = make_runner(
        place,
        config,
        weights_of(model),
        tokens=requests * (prompt + new + 128),
        max_running=requests,
        max_batched_tokens=BUDGET,
    )
    with tempfile.TemporaryDirectory(prefix="preble-bench-") as folder:
        tokenizer = make_tokenizer(shape, Path(folder))

    def ours(prompts: list[Tokens]) -> list[list[int]]:
        driver = Driver.make(runner, tokenizer, max_running=requests, max_batched_tokens=BUDGET)
        driver.submit(prompts, new)
        driver.finish()
        return list(driver.outputs.values())

    def prompts_of(seed: int) -> list[Tokens]:
        return random_prompts(requests, prompt, shape.vocabulary, seed)

    rates: list[float] = []
    _timed(place, ours, prompts_of(100))  # warms up
    for round_ in range(1 if place.toy else ROUNDS):
        seconds, ours_now = _timed(place, ours, prompts_of(round_))
        rates.append(requests * new / seconds)
        record.say(f"Preble: {rates[-1]:.0f} tok/s")
    record.figure("Preble, 64 x (512 + 128)", statistics.median(rates), "tok/s", spread=(min(rates), max(rates)))
    record.note("first tokens", [tokens[0] for tokens in ours_now[:8]])

    peer = _Peer(place, model, new)
    chosen = _fastest(place, record, peer, prompts_of, until)
    ratios: list[float] = []
    theirs_rates: list[float] = []
    for round_ in range(1 if place.toy else ROUNDS):
        prompts = prompts_of(200 + round_)
        our_seconds, our_tokens = _timed(place, ours, prompts)
        their_seconds, their_tokens = _timed(place, peer.run, prompts)
        ratios.append(their_seconds / our_seconds)
        theirs_rates.append(requests * new / their_seconds)
        agree = sum(a[0] == b[0] for a, b in zip(our_tokens, their_tokens, strict=True)) / requests
        record.say(f"round {round_ + 1}: {ratios[-1]:.2f}x; {agree:.0%} of first tokens agree")
        record.note(f"agreement of first tokens, round {round_ + 1}", agree)
        # After every round: there may be no time for the next.
        spread = (min(theirs_rates), max(theirs_rates))
        record.figure("transformers, 64 x (512 + 128)", statistics.median(theirs_rates), "tok/s", spread=spread)
        record.figure(PEER, statistics.median(ratios), "x", spread=(min(ratios), max(ratios)), settings=chosen)
    peer.close()


def _fastest(
    place: Place, record: Record, peer: _Peer, prompts_of: Callable[[int], list[Tokens]], until: float
) -> dict[str, Any]:
    """Leave the peer set up in the way that was fastest. Raises RuntimeError if it ran in no way."""
    seconds: dict[int, float] = {}
    reasons: list[str] = []
    for index, settings in enumerate(SETTINGS[:1] if place.toy else SETTINGS):
        if seconds and time.monotonic() > until:
            record.note("not tried, for lack of time", str(settings))
            break
        try:
            peer.set_up(settings)
            peer.run(prompts_of(300))  # captures graphs, fills caches
            seconds[index], _ = _timed(place, peer.run, prompts_of(301 + index))
            record.say(f"transformers with {settings or 'its defaults'}: {seconds[index]:.2f} s")
        except Exception as error:  # a peer that fails in one way may run in another
            reasons.append(f"{settings or 'defaults'}: {type(error).__name__}: {str(error)[:300]}")
            record.note("transformers failed", reasons)
            if "CUDA error" in str(error):
                raise
    if not seconds:
        raise RuntimeError(f"transformers' continuous batching did not run: {'; '.join(reasons)}")
    best = min(seconds, key=lambda index: seconds[index])
    if len(seconds) + len(reasons) > 1:  # another one is set up now
        peer.set_up(SETTINGS[best])
        peer.run(prompts_of(310))
    return {**SETTINGS[best], "attention": peer.attention}


class _Peer:
    """`generate_batch` of a transformers model, whose manager stays from call to call."""

    def __init__(self, place: Place, model: Any, new_tokens: int) -> None:
        from transformers import GenerationConfig

        generation_config: Any = GenerationConfig
        self._place = place
        self._model = model
        self._new_tokens = new_tokens
        self._config: Any = None
        self._generation: Any = generation_config(
            max_new_tokens=new_tokens, do_sample=False, eos_token_id=-1, pad_token_id=0
        )

    @property
    def attention(self) -> str:
        return str(self._model.config._attn_implementation)

    def set_up(self, settings: dict[str, Any]) -> None:
        """Start anew with these settings."""
        from transformers import ContinuousBatchingConfig

        self.close()
        limits: dict[str, Any] = {"max_memory_percent": SHARE_OF_MEMORY}
        if self._place.toy:
            size = "page_size" if "page_size" in _fields(ContinuousBatchingConfig) else "block_size"
            limits = {"num_blocks": 16, size: 32, "max_batch_tokens": 64}
        self._config = ContinuousBatchingConfig(**limits, **settings)

    def close(self) -> None:
        """End the manager and its thread."""
        self._model.destroy_cached_continuous_batching_manager()

    def run(self, prompts: list[Tokens]) -> list[list[int]]:
        """Raises RuntimeError when not all tokens came."""
        results = self._model.generate_batch(
            inputs=[prompt.tolist() for prompt in prompts],
            generation_config=self._generation,
            continuous_batching_config=self._config,
            persistent_manager=True,
        )
        outputs = [list(result.generated_tokens) for result in results.values()]
        errors = [result.error for result in results.values() if result.error]
        if len(outputs) != len(prompts) or any(len(tokens) != self._new_tokens for tokens in outputs):
            lengths = sorted({len(tokens) for tokens in outputs})
            raise RuntimeError(
                f"{len(outputs)} of {len(prompts)} requests came back, with {lengths} tokens; {errors[:1]}"
            )
        return outputs


def _fields(config: Any) -> set[str]:
    return {field.name for field in dataclasses.fields(config)}


def _timed(
    place: Place, run: Callable[[list[Tokens]], list[list[int]]], prompts: list[Tokens]
) -> tuple[float, list[list[int]]]:
    place.synchronize()
    began = time.perf_counter()
    outputs = run(prompts)
    place.synchronize()
    return time.perf_counter() - began, outputs


def _versions() -> dict[str, str]:
    import transformers

    return {"transformers": transformers.__version__, "torch": torch.__version__}


def make_model(place: Place, shape: Shape, context: int) -> Any:
    """A transformers Llama of the shape with random weights, made on the device."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=shape.vocabulary,
        hidden_size=shape.hidden,
        intermediate_size=shape.intermediate,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.kv_heads,
        head_dim=shape.head_dim,
        max_position_embeddings=context,
        rms_norm_eps=EPS,
        rope_parameters={"rope_type": "default", "rope_theta": ROPE_THETA},
        tie_word_embeddings=shape.tied,
        bos_token_id=None,
        eos_token_id=None,
    )
    config._attn_implementation = "sdpa"
    default = torch.get_default_dtype()
    torch.set_default_dtype(place.dtype)
    try:
        with torch.device(place.device):
            model = LlamaForCausalLM(config)
    finally:
        torch.set_default_dtype(default)
    model.train(False)
    generator = place.generator(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" not in name:
                parameter.normal_(0, parameter.shape[-1] ** -0.5, generator=generator)
    return model


def weights_of(model: Any) -> DecoderWeights:
    """The same weights for Preble: what is not merged is not copied either."""

    def norm(module: Any) -> RMSNorm:
        return RMSNorm(module.weight.detach(), EPS)

    def merged(*modules: Any) -> Linear:
        return Linear(torch.cat([module.weight.detach() for module in modules]))

    layers = tuple(
        LayerWeights(
            attention_norm=norm(layer.input_layernorm),
            qkv=merged(layer.self_attn.q_proj, layer.self_attn.k_proj, layer.self_attn.v_proj),
            qk_norm=None,
            output=Linear(layer.self_attn.o_proj.weight.detach()),
            mlp_norm=norm(layer.post_attention_layernorm),
            gate_up=merged(layer.mlp.gate_proj, layer.mlp.up_proj),
            down=Linear(layer.mlp.down_proj.weight.detach()),
        )
        for layer in model.model.layers
    )
    embedding = model.model.embed_tokens.weight.detach()
    return DecoderWeights(embedding, layers, norm(model.model.norm), Linear(model.lm_head.weight.detach()))
