"""The GPU path from the application's end, in Triton's interpreter: `Cluster` and everything below it."""

from __future__ import annotations

import os
from pathlib import Path

import anyio
import pytest
from checkpoints import write_checkpoint

import preble


@pytest.mark.anyio
@pytest.mark.parametrize("anyio_backend", ["trio"])
@pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") != "1", reason="the interpreter is used where there is no GPU")
@pytest.mark.filterwarnings("ignore:(overflow|invalid value) encountered in:RuntimeWarning")
async def test_a_cluster_over_the_kernels_says_what_the_cpu_says(tmp_path: Path) -> None:
    """Two replicas at once, a stream beside them, and a request that is cancelled in the middle."""
    write_checkpoint(tmp_path, "llama", head_dim=16)
    options = {"devices": ["cpu"], "page_size": 16, "kv_memory": "64KiB", "dtype": "float32", "max_running": 3}
    prompts = ["tell me of the sea", "tell me of the moon"]
    results = []
    for attention in ("auto", "triton"):
        async with preble.Cluster(
            tmp_path, replicas=2, attention=attention, max_batched_tokens=32, policy="round-robin", **options
        ) as cluster:
            with anyio.CancelScope() as scope:
                async for _ in cluster.stream("a prompt nobody waits for", max_tokens=200, ignore_eos=True):
                    scope.cancel()
            outputs = await cluster.generate_many(prompts, max_tokens=3, temperature=0, ignore_eos=True)
            results.append([output.token_ids for output in outputs])
            stats = cluster.stats()
        assert [replica.attention for replica in stats.replicas] == ["torch" if attention == "auto" else "triton"] * 2
    assert results[0] == results[1]
