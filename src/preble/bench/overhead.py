"""What Preble costs besides the model: Python in a step, and the import of the package."""

from __future__ import annotations

import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

    from preble.engine.batch import ForwardBatch
    from preble.engine.config import ModelConfig
    from preble.engine.kv_cache import KVCache

IDLE_VOCABULARY = 512
"""So few logits that choosing from them takes torch no time worth mentioning."""


class IdleModel:
    """Computes nothing: a step with it costs what the engine adds around a model."""

    attention = "none"

    def __init__(self, config: ModelConfig, requests: int) -> None:
        import torch

        self.config = config
        self.device = torch.device("cpu")
        self.dtype = torch.bfloat16
        self._logits = torch.randn(requests, IDLE_VOCABULARY, generator=torch.Generator().manual_seed(0))

    def forward(self, batch: ForwardBatch, kv: KVCache) -> torch.Tensor:
        """Logits made beforehand, [R, IDLE_VOCABULARY]."""
        return self._logits[: len(batch.logit_rows)]


def step_overhead(checkpoint: Path, requests: int = 32, steps: int = 200, context: int = 500) -> float:
    """Seconds of a decode step around the model, median: plan, batch, greedy sampling, detokenizing, events.

    Args:
        checkpoint: gives the engine its config and tokenizer.
        requests: how many run at once, each with a prompt of `context` tokens of its own.
        steps: decode steps to measure.
    """
    import numpy as np
    import torch

    from preble.engine.config import ModelConfig
    from preble.engine.engine import Engine
    from preble.engine.host_runner import HostRunner
    from preble.engine.messages import Submit
    from preble.engine.tokenizer import Tokenizer
    from preble.sampling import SamplingParams

    page_size = 64
    length = context + 2 * steps
    model = IdleModel(ModelConfig.from_folder(checkpoint), requests)
    pages = 2 * requests * -(-length // page_size)
    engine = Engine(
        HostRunner(model, pages=pages, page_size=page_size),
        Tokenizer(checkpoint),
        max_batched_tokens=requests * context,
    )
    source = np.random.default_rng(0)
    for number in range(requests):
        engine.submit(
            Submit(
                request_id=str(number),
                token_ids=source.integers(IDLE_VOCABULARY, size=context, dtype=np.int32),
                prompt_length=context,
                max_length=length,
                sampling=SamplingParams(max_tokens=2 * steps, temperature=0, ignore_eos=True),
                seed=number,
            )
        )
    seconds = []
    with torch.inference_mode():
        while len(engine.step().deltas) < requests:
            pass
        before = engine.generated_tokens
        for _ in range(steps):
            began = time.perf_counter()
            engine.step()
            seconds.append(time.perf_counter() - began)
    assert engine.generated_tokens == before + steps * requests, "some requests did not run all the time"
    return statistics.median(seconds)


def import_seconds(repeats: int = 5) -> float:
    """Seconds that `import preble` takes in a fresh interpreter, median."""
    code = "import time; began = time.perf_counter(); import preble; print(time.perf_counter() - began)"
    times = [
        float(subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout)
        for _ in range(repeats)
    ]
    return statistics.median(times)
