"""Architectures outside the fused decoder, on a device: the tokens of the CPU, whatever kernels attend."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from checkpoints import byte_tokenizer
from device_world import finish, submit, tokens
from other_checkpoints import REFUSED, SUPPORTED, VOCABULARY, write

from preble.engine.config import ModelConfig
from preble.engine.device.batch import DecodeInputs, DeviceBatch, ExtendInputs
from preble.engine.device.kernel_attention import KernelAttention
from preble.engine.device.runner import DeviceRunner
from preble.engine.device.transformers_device import DeviceTransformers, load_device_transformers
from preble.engine.engine import Engine
from preble.engine.host_runner import HostRunner
from preble.engine.kv_cache import FP8, KVCache
from preble.engine.runner import Runner
from preble.engine.tokenizer import Tokenizer
from preble.engine.transformers_code import Attend, TransformersCode, load_code
from preble.engine.transformers_model import load_transformers_model
from preble.errors import UnsupportedModel
from preble.kernels.fp8 import decoded
from preble.kernels.operations import REFERENCE, TRITON, Operations

CPU = torch.device("cpu")
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
PAGE_SIZE = 16
MAX_RUNNING = 4
WIDE = ("gemma3_text", SUPPORTED["gemma3 window"][1] | {"head_dim": 64})
"""Heads as wide as compiled kernels need them."""
Checkpoint = Callable[[str], tuple[Path, ModelConfig]]

# The interpreter multiplies memory that nobody has written, too, and masks it afterwards.
pytestmark = pytest.mark.filterwarnings("ignore:(overflow|invalid value) encountered in matmul:RuntimeWarning")


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    """The folder of an architecture, and its config."""
    folders: dict[str, Path] = {}

    def of(name: str) -> tuple[Path, ModelConfig]:
        if name not in folders:
            folders[name] = tmp_path_factory.mktemp("other")
            write(folders[name], *(WIDE if name == "wide" else SUPPORTED[name]))
            byte_tokenizer().save_pretrained(folders[name])
        return folders[name], ModelConfig.from_folder(folders[name])

    return of


def load(folder: Path, config: ModelConfig, operations: Operations = REFERENCE) -> DeviceTransformers:
    return load_device_transformers(folder, config, operations, device=DEVICE, dtype="float32")


def make_kv(config: ModelConfig, pages: int, dtype: torch.dtype = torch.float32) -> KVCache:
    kv = KVCache(
        layers=config.layers,
        pages=pages,
        page_size=PAGE_SIZE,
        kv_heads=config.kv_heads,
        head_dim=config.head_dim,
        dtype=dtype,
        device=DEVICE,
    )
    # What was never written must never be read.
    for part in (kv.keys, kv.values):
        part.fill_(0x7F if dtype == FP8 else float("nan"))
    return kv


def make_attention(config: ModelConfig, operations: Operations) -> KernelAttention:
    return KernelAttention(
        config,
        operations=operations,
        dtype=torch.float32,
        device=DEVICE,
        page_size=PAGE_SIZE,
        max_decodes=MAX_RUNNING,
    )


def device_runner(model: DeviceTransformers, operations: Operations) -> DeviceRunner:
    return DeviceRunner(
        model,
        operations=operations,
        attention=make_attention(model.config, operations),
        kv=make_kv(model.config, pages=24),
        max_running=MAX_RUNNING,
        max_batched_tokens=24,
    )


def greedy(runner: Runner, folder: Path, prompts: list[list[int]], count: int) -> dict[str, list[int]]:
    """What every request generates."""
    engine = Engine(runner, Tokenizer(folder), max_batched_tokens=24, max_running=MAX_RUNNING)
    deltas = finish(engine, [submit(str(number), prompt, count) for number, prompt in enumerate(prompts)])
    return {request_id: tokens(own) for request_id, own in deltas.items()}


def prompts(count: int) -> list[list[int]]:
    """Some begin alike; some do not fit into a step."""
    random = np.random.default_rng(0)
    stem = random.integers(3, VOCABULARY, 32).tolist()
    return [
        stem[: 16 * (number % 3)] + random.integers(3, VOCABULARY, 5 + 3 * number).tolist() for number in range(count)
    ]


@pytest.mark.parametrize(
    ("name", "operations", "requests", "count"),
    [
        *((name, REFERENCE, 6, 8) for name in ("gpt_neox", "gemma3 window", "phi3 longrope", "qwen3_moe")),
        ("wide", TRITON, 3, 3),
    ],
)
def test_the_tokens_of_the_cpu(
    name: str, operations: Operations, requests: int, count: int, checkpoint: Checkpoint
) -> None:
    folder, config = checkpoint(name)
    host = HostRunner(
        load_transformers_model(folder, config, device=CPU, dtype="float32"), pages=24, page_size=PAGE_SIZE
    )
    expected = greedy(host, folder, prompts(requests), count)
    assert len({tuple(generated) for generated in expected.values()}) > requests // 2  # the comparison means something
    runner = device_runner(load(folder, config, operations), operations)
    assert greedy(runner, folder, prompts(requests), count) == expected


def integers(values: Any) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.int32, device=DEVICE)


def prefill(tokens: int, config: ModelConfig) -> DeviceBatch:
    """One request in pages 1 and 2."""
    return DeviceBatch(
        token_ids=integers([(7 * place + 3) % VOCABULARY for place in range(tokens)]),
        positions=integers(range(tokens)),
        slots=integers(range(PAGE_SIZE, PAGE_SIZE + tokens)),
        tables=integers([[1, 2]]),
        decodes=None,
        extends=ExtendInputs(
            rows=integers([0]),
            context_lengths=integers([tokens]),
            query_starts=integers([0, tokens]),
            tiles=integers([[0, 0]]),
            longest=tokens,
            longest_context=tokens,
        ),
        logit_rows=None,
    )


@pytest.mark.parametrize("operations", [REFERENCE, TRITON], ids=["torch", "triton"])
def test_padding_writes_nothing_and_disturbs_nobody(operations: Operations, checkpoint: Checkpoint) -> None:
    folder, config = checkpoint("wide")
    model, attention, kv = load(folder, config), make_attention(config, operations), make_kv(config, pages=3)
    model.forward(prefill(9, config), kv, attention)
    before = kv.keys.clone(), kv.values.clone()

    def decode(padding: int) -> torch.Tensor:
        batch = DeviceBatch(
            token_ids=integers([5] + [0] * padding),
            positions=integers([9] + [0] * padding),
            slots=integers([PAGE_SIZE + 9] + [-1] * padding),
            tables=integers([[1, 2]]),
            decodes=DecodeInputs(integers([0] * (1 + padding)), integers([10] + [0] * padding)),
            extends=None,
            logit_rows=None,
        )
        return model.forward(batch, kv, attention)

    alone = decode(0)
    padded = decode(3)
    assert padded.shape == (4, config.vocabulary_size)
    torch.testing.assert_close(padded[:1], alone)
    new = PAGE_SIZE + 9
    for part, old in zip((kv.keys, kv.values), before, strict=True):
        assert part[:, new].isfinite().all()
        part[:, new] = float("nan")
        assert torch.equal(part.nan_to_num(1e4), old.nan_to_num(1e4))


def test_logits_of_the_rows_asked_for(checkpoint: Checkpoint) -> None:
    folder, config = checkpoint("gpt_neox")
    model, attention, kv = load(folder, config), make_attention(config, REFERENCE), make_kv(config, pages=3)
    batch = prefill(9, config)
    every = model.forward(batch, kv, attention)
    some = model.forward(replace(batch, logit_rows=integers([8, 2])), kv, attention)
    torch.testing.assert_close(some, every[[8, 2]])


class Scrambled(TransformersCode):
    """Code that leaves Q, K and V in memory head by head, instead of token by token."""

    def run(
        self, token_ids: torch.Tensor, positions: torch.Tensor, attend: Attend, logit_rows: torch.Tensor | None = None
    ) -> torch.Tensor:
        def scrambled(layer: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float) -> torch.Tensor:
            by_head = [x.transpose(0, 1).contiguous().transpose(0, 1) for x in (q, k, v)]
            return attend(layer, *by_head, scale)

        return super().run(token_ids, positions, scrambled, logit_rows)


def test_heads_wherever_the_code_left_them(checkpoint: Checkpoint) -> None:
    folder, config = checkpoint("wide")
    loaded = load_code(folder, config, device=DEVICE, dtype="float32")
    logits = []
    for code in (loaded, Scrambled(config, loaded._model)):
        attention, kv = make_attention(config, TRITON), make_kv(config, pages=3)
        logits.append(DeviceTransformers(code, TRITON).forward(prefill(5, config), kv, attention))
    torch.testing.assert_close(*logits)


def test_one_layout_of_q_for_every_number_of_tokens(checkpoint: Checkpoint) -> None:
    """Kernels are compiled for it."""
    folder, config = checkpoint("gpt_neox")
    model, kv = load(folder, config), make_kv(config, pages=3)
    strides = set()

    class Watching(KernelAttention):
        def attend(self, layer: int, q: torch.Tensor, kv: KVCache, scale: float) -> torch.Tensor:
            strides.add(q.stride())
            return super().attend(layer, q, kv, scale)

    attention = Watching(
        config, operations=REFERENCE, dtype=torch.float32, device=DEVICE, page_size=PAGE_SIZE, max_decodes=1
    )
    for length in (1, 2, 9):
        model.forward(prefill(length, config), kv, attention)
    assert strides == {(config.query_heads * config.head_dim, config.head_dim, 1)}


def test_refuses_heads_in_another_dtype(checkpoint: Checkpoint) -> None:
    folder, config = checkpoint("qwen3_moe")
    code = load_code(folder, config, device=DEVICE, dtype="bfloat16")
    code._model.model.layers[1].self_attn.q_norm.float()
    with pytest.raises(UnsupportedModel, match=r"layer 1 of a model in torch.bfloat16 attends in .*torch.float32"):
        DeviceTransformers(code, REFERENCE).try_out()


@pytest.mark.parametrize("operations", [REFERENCE, TRITON], ids=["torch", "triton"])
def test_a_cache_in_8_bits_holds_k_and_v_in_units_of_its_scales(operations: Operations, checkpoint: Checkpoint) -> None:
    folder, config = checkpoint("wide")
    model, attention = load(folder, config), make_attention(config, operations)
    exact, small = make_kv(config, pages=3), make_kv(config, pages=3, dtype=FP8)
    assert small.key_scales is not None
    assert small.value_scales is not None
    random = torch.Generator().manual_seed(0)
    for scales in (small.key_scales, small.value_scales):
        scales.copy_(torch.rand(scales.shape, generator=random) * 0.02 + 0.01)
    wanted = model.forward(prefill(9, config), exact, attention)
    found = model.forward(prefill(9, config), small, attention)
    used = slice(PAGE_SIZE, PAGE_SIZE + 9)
    for codes, scales, real in (
        (small.keys, small.key_scales, exact.keys),
        (small.values, small.value_scales, exact.values),
    ):
        held = decoded(codes[0, used]) * scales[0, :, None]  # later layers have seen the rounding of earlier ones
        torch.testing.assert_close(held, real[0, used], rtol=2.0**-4, atol=1e-4)
        assert (codes[:, : used.start] == 0x7F).all()
    assert (found - wanted).norm() < 0.2 * (wanted - wanted.mean(-1, keepdim=True)).norm()


@pytest.mark.parametrize("case", REFUSED)
def test_refuses_what_would_go_wrong(case: str, tmp_path: Path) -> None:
    model_type, fields, message = REFUSED[case]
    original = write(tmp_path, model_type, fields)
    with pytest.raises(UnsupportedModel, match=message) as caught:
        load(tmp_path, ModelConfig.from_folder(tmp_path))
    assert type(original).__name__ in str(caught.value)


def test_tries_the_kernels_that_it_will_run_with(checkpoint: Checkpoint) -> None:
    folder, config = checkpoint("gpt_neox")

    def swapped(k: torch.Tensor, v: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, **named: Any) -> None:
        REFERENCE.store_kv(v, k, keys, values, **named)

    with pytest.raises(UnsupportedModel, match="its logits are not those of its own attention"):
        load(folder, config, replace(REFERENCE, store_kv=swapped))


def test_no_cuda_graph_holds_code_that_promised_nothing(checkpoint: Checkpoint) -> None:
    assert not load(*checkpoint("gpt_neox")).capturable
