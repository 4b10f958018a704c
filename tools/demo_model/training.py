"""The training itself: the same seed gives the same weights, on the same machine with the same torch."""

from __future__ import annotations

import hashlib
import time
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch.optim import AdamW, Muon, Optimizer
from transformers import LlamaForCausalLM

from tools.demo_model.curriculum import LEVELS, Curriculum
from tools.demo_model.network import new_network
from tools.demo_model.rows import KINDS, Batch, RowMaker
from tools.demo_model.vocabulary import write_tokenizer

MATRICES_RATE, OTHERS_RATE = 3e-3, 2e-3
FIRST_MATRICES_RATE = 2e-3
"""Muon's rate until lookups among the fewest facts succeed."""
WARM_UP = 20
"""Steps over which the rates rise to these."""
SETTLING, COOLING = 2200, 1000
"""Steps after the last level was reached, and how many of them, at the end, let the rates fall to nearly nothing."""


@dataclass
class Progress:
    """How far a training is."""

    step: int = 0
    tokens: int = 0
    answer_tokens: int = 0
    last_level_since: int | None = None
    """The step at which the last level was reached."""

    @property
    def end(self) -> int | None:
        """The step after which it ends, as soon as that is known."""
        return None if self.last_level_since is None else self.last_level_since + SETTLING

    @property
    def rate(self) -> float:
        """The factor of the learning rates in this step."""
        rate = min(1.0, (self.step + 1) / WARM_UP)
        return rate if self.end is None else rate * min(1.0, max(0.02, (self.end - self.step) / COOLING))


def train(seed: int, folder: Path, steps: int | None = None) -> str:
    """Train a model and write its folder. `steps` cuts the training short.

    Progress is printed. Computes on one thread, since the order of additions is part of the result.

    Returns:
        The SHA-256 of model.safetensors.
    """
    torch.set_num_threads(1)
    torch.manual_seed(seed)
    network = new_network().train()
    optimizers = _optimizers(network)
    rows, curriculum, progress = RowMaker(seed), Curriculum(seed), Progress()
    began = time.monotonic()
    print(f"seed {seed}, {sum(weight.numel() for weight in network.parameters()):,} parameters", flush=True)
    while progress.step != (progress.end if steps is None else steps):
        batch = rows.batch(curriculum.choose(), curriculum.level)
        _set_rates(optimizers, progress.rate, first=curriculum.level is LEVELS[0])
        loss, right = _step(network, optimizers, batch)
        progress.step += 1
        progress.tokens += batch.tokens.numel()
        progress.answer_tokens += len(batch.targets)
        minutes = (time.monotonic() - began) / 60
        if curriculum.learned(right[KINDS.index("lookup")]):
            if curriculum.done:
                progress.last_level_since = progress.step
            print(f"step {progress.step}: {curriculum.level.facts} facts from here", flush=True)
        if progress.step % 50 == 0:
            print(
                f"step {progress.step}, {progress.tokens / 1e6:.2f} M tokens, {minutes:.1f} min: loss {loss:.3f}; "
                f"of lookups among {curriculum.level.facts} facts {curriculum.accuracy:.3f} right; now "
                + ", ".join(f"{kind} {share:.2f}" for kind, share in zip(KINDS, right, strict=True)),
                flush=True,
            )
        if progress.step % 500 == 0:
            write(network, folder)
    write(network, folder)
    print(
        f"{progress.step} steps, {progress.tokens:,} tokens, {progress.answer_tokens:,} of them in answers, "
        f"{(time.monotonic() - began) / 60:.1f} minutes"
    )
    return hashlib.sha256((folder / "model.safetensors").read_bytes()).hexdigest()


def write(network: LlamaForCausalLM, folder: Path) -> None:
    """Write the checkpoint's folder."""
    network.save_pretrained(folder)
    write_tokenizer(folder)


def _optimizers(network: LlamaForCausalLM) -> list[Optimizer]:
    """Muon for the matrices of the layers, AdamW for embeddings and scales.

    Muon's updates change all directions of a matrix alike, also those in which the gradient is small. The heads that
    lookups need are such directions for long: with AdamW alone at one rate they never came.
    """
    matrices = [p for name, p in network.named_parameters() if p.ndim == 2 and "embed" not in name]
    others = [p for name, p in network.named_parameters() if p.ndim != 2 or "embed" in name]
    return [
        Muon(matrices, lr=MATRICES_RATE, weight_decay=0.01, adjust_lr_fn="match_rms_adamw"),
        AdamW(others, lr=OTHERS_RATE, betas=(0.9, 0.98), weight_decay=0.01),
    ]


def _set_rates(optimizers: list[Optimizer], factor: float, *, first: bool) -> None:
    for optimizer, rate in zip(optimizers, (FIRST_MATRICES_RATE if first else MATRICES_RATE, OTHERS_RATE), strict=True):
        optimizer.param_groups[0]["lr"] = rate * factor


def _step(network: LlamaForCausalLM, optimizers: list[Optimizer], batch: Batch) -> tuple[float, list[float]]:
    """The loss, and for each of `KINDS` the share of tokens in its answers that were predicted right, or NaN."""
    # Only answers count: nothing else in a row can be predicted, and guessing at it drowns what can be learned.
    with torch.autocast("cpu", torch.bfloat16):
        hidden = network.model(batch.tokens, use_cache=False).last_hidden_state
        scores = network.lm_head(hidden.flatten(0, 1)[batch.places]).float()
    loss = F.cross_entropy(scores, batch.targets)
    torch.autograd.backward(loss)
    torch.nn.utils.clip_grad_norm_(network.parameters(), 1.0)
    for optimizer in optimizers:
        optimizer.step()
    network.zero_grad(set_to_none=True)
    right = (scores.argmax(-1) == batch.targets).float()
    return loss.item(), [right[batch.kinds == kind].mean().item() for kind in range(len(KINDS))]
