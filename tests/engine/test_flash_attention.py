"""Attention by the FlashAttention packages gives what our kernels' references give.

The packages need nvcc to build and a GPU to run, so that neither is here when this is tested. Stand-ins of the same
signatures take their place: they refuse what the packages refuse and compute, by definition, what those document.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass, fields, is_dataclass, replace
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from preble.engine.config import ModelConfig
from preble.engine.device.batch import DecodeInputs, DeviceBatch, ExtendInputs
from preble.engine.device.flash_attention import FlashAttention, flash_attention_problem
from preble.engine.device.kernel_attention import KernelAttention
from preble.engine.kv_cache import FP8, KVCache
from preble.errors import DeviceError
from preble.kernels.operations import REFERENCE

CPU = torch.device("cpu")
GPU = torch.device("cuda", 0)
AMPERE, HOPPER = (8, 0), (9, 0)


def attend_by_definition(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float, causal: bool, window: tuple[int, int]
) -> torch.Tensor:
    """q [n, heads, head_dim] ends where k and v [t, kv_heads, head_dim] do; rows that see nothing are 0."""
    ends = torch.arange(len(q))[:, None] + len(k) - len(q)
    tokens = torch.arange(len(k))
    left, right = window
    seen = torch.ones(len(q), len(k), dtype=torch.bool)
    if causal:
        seen &= tokens <= ends
    if left >= 0:
        seen &= tokens >= ends - left
    if right >= 0:
        seen &= tokens <= ends + right
    grouped = q.float().unflatten(1, (k.shape[1], -1))
    scores = torch.einsum("nhgd,thd->nhgt", grouped, k.float()) * scale
    weights = scores.masked_fill(~seen[:, None, None], float("-inf")).softmax(-1).nan_to_num(0.0)
    return torch.einsum("nhgt,thd->nhgd", weights, v.float()).flatten(1, 2).to(q.dtype)


def gathered(cache: torch.Tensor, pages: torch.Tensor, length: int) -> torch.Tensor:
    """The first `length` tokens of a request. What lies behind them must not be looked at: not even page numbers."""
    used = -(-length // cache.shape[1])
    assert used <= len(pages), "the table has no room for the context"
    return cache[pages[:used].long()].flatten(0, 1)[:length]


def check(q: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, *indices: torch.Tensor) -> None:
    assert q.dtype in (torch.float16, torch.bfloat16)
    assert keys.dtype == values.dtype == q.dtype
    assert keys.ndim == values.ndim == 4
    for tensor in (q, keys, values):
        assert tensor.stride(-1) == 1
    assert q.shape[-1] == keys.shape[-1] <= 256
    assert q.shape[-1] % 8 == 0
    for index in indices:
        assert index.dtype == torch.int32
        assert index.is_contiguous()


def flash_attn_2(version: str = "2.8.3.post1") -> ModuleType:
    """A stand-in for the package flash-attn."""

    def flash_attn_with_kvcache(
        q, k_cache, v_cache, k=None, v=None, rotary_cos=None, rotary_sin=None, cache_seqlens=None,
        cache_batch_idx=None, cache_leftpad=None, block_table=None, softmax_scale=None, causal=False,
        window_size=(-1, -1), softcap=0.0, rotary_interleaved=True, alibi_slopes=None, num_splits=0,
        return_softmax_lse=False,
    ):  # fmt: skip
        check(q, k_cache, v_cache, cache_seqlens, block_table)
        assert k_cache.shape[1] % 256 == 0
        assert len(block_table) == len(cache_seqlens) == len(q)
        return torch.stack(
            [
                attend_by_definition(
                    row, gathered(k_cache, pages, length), gathered(v_cache, pages, length), softmax_scale, causal,
                    window_size,
                )
                for row, pages, length in zip(q, block_table, cache_seqlens.tolist(), strict=True)
            ]
        )  # fmt: skip

    def flash_attn_varlen_func(
        q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, dropout_p=0.0, softmax_scale=None,
        causal=False, window_size=(-1, -1), softcap=0.0, alibi_slopes=None, deterministic=False,
        return_attn_probs=False, block_table=None,
    ):  # fmt: skip
        check(q, k, v, cu_seqlens_q, cu_seqlens_k, block_table)
        assert k.shape[1] % 256 == 0
        assert max_seqlen_q == cu_seqlens_q.diff().max()
        assert max_seqlen_k == cu_seqlens_k.diff().max()
        return varlen(q, k, v, cu_seqlens_q, cu_seqlens_k.diff(), block_table, softmax_scale, causal, window_size)

    module = ModuleType("flash_attn")
    module.__version__ = version
    module.flash_attn_with_kvcache = flash_attn_with_kvcache
    module.flash_attn_varlen_func = flash_attn_varlen_func
    return module


def flash_attn_3() -> ModuleType:
    """A stand-in for `flash_attn_interface`."""

    def flash_attn_with_kvcache(
        q, k_cache, v_cache, k=None, v=None, qv=None, rotary_cos=None, rotary_sin=None, cache_seqlens=None,
        cache_batch_idx=None, cache_leftpad=None, page_table=None, cu_seqlens_q=None, cu_seqlens_k_new=None,
        max_seqlen_q=None, rotary_seqlens=None, q_descale=None, k_descale=None, v_descale=None, softmax_scale=None,
        causal=False, window_size=(-1, -1), attention_chunk=0, softcap=0.0, rotary_interleaved=True,
        scheduler_metadata=None, num_splits=0, pack_gqa=None, sm_margin=0, return_softmax_lse=False,
    ):  # fmt: skip
        check(q, k_cache, v_cache, cache_seqlens, page_table)
        if cu_seqlens_q is None:
            assert q.ndim == 4
            starts = torch.arange(len(q) + 1, dtype=torch.int32) * q.shape[1]
            flat = q.flatten(0, 1)
        else:
            check(q, k_cache, v_cache, cu_seqlens_q)
            assert max_seqlen_q == cu_seqlens_q.diff().max()
            starts, flat = cu_seqlens_q, q
        lengths = (cache_seqlens, page_table)
        return varlen(flat, k_cache, v_cache, starts, *lengths, softmax_scale, causal, window_size).view(q.shape)

    module = ModuleType("flash_attn_interface")
    module.flash_attn_with_kvcache = flash_attn_with_kvcache
    return module


def varlen(q, keys, values, starts, lengths, tables, scale, causal, window):
    assert len(starts) - 1 == len(lengths) == len(tables)
    assert starts[0] == 0
    assert starts[-1] == len(q)
    answers = [
        attend_by_definition(
            rows, gathered(keys, pages, length), gathered(values, pages, length), scale, causal, window
        )
        for rows, pages, length in zip(q.split(starts.diff().tolist()), tables, lengths.tolist(), strict=True)
    ]
    return torch.cat(answers)


Install = Callable[..., None]


@pytest.fixture
def install(monkeypatch: pytest.MonkeyPatch) -> Install:
    """Puts a GPU and packages in place; every other one is missing."""

    def put(capability: tuple[int, int], *modules: ModuleType) -> None:
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: capability)
        for name in ("flash_attn", "flash_attn_interface"):
            monkeypatch.setitem(sys.modules, name, None)
        for module in modules:
            monkeypatch.setitem(sys.modules, module.__name__, module)

    return put


def make_config(
    *, kv_heads: int = 2, group: int = 2, head_dim: int = 64, windows: tuple[int | None, ...] = (None,)
) -> ModelConfig:
    return ModelConfig(
        architecture="Test", vocabulary_size=8, hidden_size=8, intermediate_size=8, layers=len(windows),
        query_heads=kv_heads * group, kv_heads=kv_heads, head_dim=head_dim, context_length=4096, layer_windows=windows,
        eos_token_ids=frozenset(), dtype=None, fused=True,
    )  # fmt: skip


@dataclass(frozen=True)
class Case:
    """A batch: the contexts of its decodes (0 for padding), and (new tokens, context) of its chunks."""

    decodes: list[int]
    chunks: list[tuple[int, int]]
    kv_heads: int = 2
    group: int = 2
    head_dim: int = 64
    page_size: int = 256
    windows: tuple[int | None, ...] = (None,)
    dtype: torch.dtype = torch.float16
    seed: int = 0


def make(case: Case, config: ModelConfig) -> tuple[DeviceBatch, KVCache, torch.Tensor]:
    """A batch, a cache that holds NaN where nobody may read, and Q as a view into something wider."""
    generator = torch.Generator().manual_seed(case.seed)
    contexts = case.decodes + [context for _, context in case.chunks]
    pages_of = [-(-context // case.page_size) for context in contexts]
    order = torch.randperm(sum(pages_of) + 1, generator=generator).int()
    spare, owned = order[0], order[1:]
    table_rows = len(contexts) + 2
    rows = torch.randperm(table_rows, generator=generator)[: len(contexts)].int()
    tables = spare.repeat(table_rows, max(pages_of) + 1)
    kv = KVCache(
        layers=config.layers, pages=len(order), page_size=case.page_size, kv_heads=config.kv_heads,
        head_dim=config.head_dim, dtype=case.dtype, device=CPU,
    )  # fmt: skip
    written = torch.zeros(len(order), case.page_size, dtype=torch.bool)
    for row, context, own in zip(rows.tolist(), contexts, owned.split(pages_of), strict=True):
        tables[row, : len(own)] = own
        for place, page in enumerate(own.tolist()):
            written[page, : context - place * case.page_size] = True
    for part in (kv.keys, kv.values):
        part.copy_(torch.randn(part.shape, generator=generator))
        part.masked_fill_(~written.view(1, -1, 1, 1), float("nan"))
    decodes, new = len(case.decodes), [count for count, _ in case.chunks]
    tokens = decodes + sum(new)
    width = config.query_heads * config.head_dim
    q = torch.randn(tokens, width + 16, generator=generator).to(case.dtype)[:, :width]
    lengths = torch.tensor(contexts, dtype=torch.int32)
    nothing = torch.zeros(tokens, dtype=torch.int32)
    batch = DeviceBatch(
        token_ids=nothing,
        positions=nothing,
        slots=nothing,
        tables=tables,
        decodes=DecodeInputs(rows[:decodes], lengths[:decodes]) if decodes else None,
        extends=ExtendInputs(
            rows=rows[decodes:],
            context_lengths=lengths[decodes:],
            query_starts=torch.from_numpy(np.cumsum([0, *new]).astype(np.int32)),
            tiles=torch.zeros(1, 2, dtype=torch.int32),  # for kernels; the references look at the lengths
            longest=max(new),
            longest_context=max(contexts[decodes:]),
        )
        if new
        else None,
        logit_rows=None,
    )
    return batch, kv, q.unflatten(1, (config.query_heads, config.head_dim))


chunks = st.tuples(st.integers(2, 20), st.sampled_from([0, 1, 40, 300])).map(lambda pair: (pair[0], sum(pair)))
cases = st.builds(
    Case,
    decodes=st.lists(st.sampled_from([0, 1, 2, 37, 255, 256, 257, 600]), max_size=3),
    chunks=st.lists(chunks, max_size=3),
    kv_heads=st.sampled_from([1, 2]),
    group=st.sampled_from([1, 4, 7]),
    head_dim=st.sampled_from([64, 80, 128]),
    page_size=st.sampled_from([256, 512]),
    windows=st.lists(st.sampled_from([None, 1, 5, 300]), min_size=1, max_size=2).map(tuple),
    dtype=st.sampled_from([torch.float16, torch.bfloat16]),
    seed=st.integers(0, 99),
).filter(lambda case: case.decodes or case.chunks)


@pytest.mark.parametrize("generation", [2, 3])
@settings(max_examples=30, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(case=cases)
@example(case=Case([600, 0], [(9, 300)], windows=(5, None)))
def test_agrees_with_the_references(generation: int, case: Case, install: Install) -> None:
    # Only the older packages have a say in the size of pages.
    page_size = case.page_size if generation == 2 else case.page_size // 16
    install(*((AMPERE, flash_attn_2()) if generation == 2 else (HOPPER, flash_attn_3())))
    case = replace(case, page_size=page_size)
    config = make_config(kv_heads=case.kv_heads, group=case.group, head_dim=case.head_dim, windows=case.windows)
    batch, kv, q = make(case, config)
    flash = FlashAttention(config, device=CPU, page_size=page_size)
    kernels = KernelAttention(
        config, operations=REFERENCE, dtype=case.dtype, device=CPU, page_size=page_size, max_decodes=4
    )
    flash.begin(batch)
    kernels.begin(batch)
    for layer in range(config.layers):
        found, wanted = (attention.attend(layer, q, kv, 0.11) for attention in (flash, kernels))
        assert found.shape == q.shape
        assert found.is_contiguous()
        padding = [place for place, context in enumerate(case.decodes) if context == 0]
        assert not found[padding].any()
        wanted[padding] = 0
        torch.testing.assert_close(found, wanted, rtol=2e-2, atol=2e-2)


def on_meta(value: Any) -> Any:
    """The same with tensors that have no values."""
    if isinstance(value, torch.Tensor):
        return value.to("meta")
    if is_dataclass(value):
        return replace(value, **{field.name: on_meta(getattr(value, field.name)) for field in fields(value)})
    return value


def test_preparing_a_batch_asks_nothing_of_the_device(install: Install) -> None:
    install(AMPERE, flash_attn_2())
    config = make_config()
    batch, _, _ = make(Case([5, 0], [(3, 300)]), config)
    FlashAttention(config, device=CPU, page_size=256).begin(on_meta(batch))


def test_a_batch_leaves_nothing_to_the_next(install: Install) -> None:
    install(AMPERE, flash_attn_2())
    config = make_config()
    flash = FlashAttention(config, device=CPU, page_size=256)
    for case in (Case([5], [(3, 300)]), Case([], [(4, 9)]), Case([7], [])):
        batch, kv, q = make(case, config)
        flash.begin(batch)
        assert flash.attend(0, q, kv, 0.1).shape == q.shape


@pytest.mark.parametrize(
    ("capability", "page_size", "modules", "capturable"),
    [
        (AMPERE, 256, [flash_attn_2("2.7.0"), flash_attn_3()], True),
        (AMPERE, 256, [flash_attn_2("2.8.4")], False),
        (HOPPER, 64, [flash_attn_2("2.8.4"), flash_attn_3()], True),
        (HOPPER, 512, [flash_attn_2("3.0")], False),
        ((12, 0), 256, [flash_attn_2()], True),
    ],
)
def test_the_best_package_that_fits(
    capability: tuple[int, int], page_size: int, modules: list[ModuleType], capturable: bool, install: Install
) -> None:
    install(capability, *modules)
    half = {"dtype": torch.bfloat16, "kv_dtype": torch.bfloat16}
    assert flash_attention_problem(make_config(), page_size=page_size, device=GPU, **half) is None
    flash = FlashAttention(make_config(), device=GPU, page_size=page_size)
    assert flash.name == "flash-attn"
    assert flash.capturable == capturable


def early_flash_attn_3() -> ModuleType:
    module = ModuleType("flash_attn_interface")
    module.flash_attn_with_kvcache = lambda q, k_cache, v_cache, cache_seqlens=None: None
    return module


@pytest.mark.parametrize(
    ("capability", "page_size", "modules", "message"),
    [
        (AMPERE, 256, [], "^the package flash-attn cannot be imported"),
        (AMPERE, 256, [flash_attn_3()], "^the package flash-attn cannot be imported"),
        (AMPERE, 256, [ModuleType("flash_attn")], "cannot be imported"),
        (AMPERE, 256, [flash_attn_2("2.6.3")], "2.6.3 is too old"),
        (AMPERE, 64, [flash_attn_2()], "page_size is 64 .use page_size=256"),
        (AMPERE, 64, [flash_attn_2(), flash_attn_3()], "page_size is 64"),
        ((10, 0), 64, [flash_attn_2(), flash_attn_3()], "page_size is 64"),
        (HOPPER, 64, [flash_attn_2()], "FlashAttention 3 cannot be imported .*page_size is 64"),
        (HOPPER, 64, [], "FlashAttention 3 cannot be imported .*flash-attn cannot be imported"),
        (HOPPER, 64, [early_flash_attn_3()], "without page tables"),
    ],
)
def test_says_which_package_is_missing(
    capability: tuple[int, int], page_size: int, modules: list[ModuleType], message: str, install: Install
) -> None:
    install(capability, *modules)
    half = {"dtype": torch.bfloat16, "kv_dtype": torch.bfloat16}
    problem = flash_attention_problem(make_config(), page_size=page_size, device=GPU, **half)
    with pytest.raises(DeviceError, match=message) as caught:
        FlashAttention(make_config(), device=GPU, page_size=page_size)
    assert str(caught.value) == problem


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"device": CPU}, "CUDA devices only, not on cpu"),
        ({"dtype": torch.float32, "kv_dtype": torch.float32}, "not in float32"),
        ({"kv_dtype": FP8}, "kv_dtype='auto'"),
        ({"config": make_config(head_dim=264)}, "up to 256, and Test has 264"),
        ({"config": make_config(head_dim=36)}, "multiples of 8 up to 256, and Test has 36"),
    ],
)
def test_says_what_no_package_covers(changes: dict[str, Any], message: str, install: Install) -> None:
    install(HOPPER, flash_attn_2(), flash_attn_3())
    usual = {"config": make_config(), "dtype": torch.float16, "kv_dtype": torch.float16, "page_size": 64, "device": GPU}
    assert flash_attention_problem(**usual) is None
    problem = flash_attention_problem(**usual | changes)
    assert problem is not None
    assert message in problem


def test_says_that_a_gpu_is_too_old(install: Install) -> None:
    install((7, 5), flash_attn_2())
    half = {"dtype": torch.float16, "kv_dtype": torch.float16}
    problem = flash_attention_problem(make_config(), page_size=256, device=GPU, **half)
    assert problem == "cuda:0 has compute capability 7.5, and it needs 8.0 (Ampere) or newer"
