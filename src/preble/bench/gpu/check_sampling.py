"""Sampling: the very tokens of the reference, and tokens as often as their probability says."""

from __future__ import annotations

import math
import random
from collections.abc import Sequence

import numpy as np
import torch

from preble.bench.gpu.check_decode import HALVES
from preble.bench.gpu.exact import described, same_bits, varied
from preble.bench.gpu.place import Place
from preble.bench.gpu.record import Record
from preble.kernels.sampling import SamplingWorkspace, sample, sample_reference
from preble.kernels.sampling_rows import SamplingRows, count_tokens, packed_row
from preble.sampling import SamplingParams

SEED = 1234
SIGMAS = 5.0
"""How far chi-square may lie above its mean: less than once in a million by chance."""
RULES = (
    SamplingParams(temperature=0.0),
    SamplingParams(temperature=1.0),
    SamplingParams(temperature=0.7, top_k=40),
    SamplingParams(temperature=1.3, top_p=0.9),
    SamplingParams(temperature=0.9, top_k=200, top_p=0.8),
    SamplingParams(temperature=1.0, min_p=0.02),
    SamplingParams(temperature=1.0, top_p=0.999, min_p=0.0001),
    SamplingParams(temperature=0.0, repetition_penalty=1.3, frequency_penalty=0.5),
    SamplingParams(temperature=0.8, presence_penalty=1.0, top_p=0.95),
    SamplingParams(temperature=1.0, logit_bias=((3, 5.0), (11, -math.inf)), top_k=20),
    SamplingParams(temperature=0.5, min_tokens=1000, max_tokens=1000, stop_token_ids=(1, 2, 5)),
)


def run_sampling(place: Place, record: Record, shard: tuple[int, int]) -> None:
    """Batches in which every request samples by another rule."""
    cases = varied(
        {
            "dtype": (torch.float32,) if place.toy else (*HALVES, torch.float32),
            "vocabulary": (300,) if place.toy else (128_256, 32_000, 50_257, 151_936, 300),
            "spread": (3.0, 0.5, 10.0),
        },
        1 if place.toy else 8,
    )
    first, step = shard
    for index, case in list(enumerate(cases))[first::step]:
        name = f"sampling: {described(case)}"
        try:
            _same_tokens(place, record, name, index, **case)
        except Exception as error:  # of the kernel, of Triton's compiler, of CUDA: the other cases still tell something
            record.failed_check(name, error)
            if "CUDA error" in str(error):
                raise
    for rule in RULES[1:2] if place.toy else (*RULES[1:4], RULES[5]):
        _distribution(place, record, rule)
    _invalid(place, record)
    record.say("sampling checked")


def _same_tokens(
    place: Place, record: Record, name: str, seed: int, *, dtype: torch.dtype, vocabulary: int, spread: float
) -> None:
    source = random.Random(seed)
    rules = [*RULES] if place.toy else [rule for rule in RULES for _ in range(3)]
    batch = len(rules)
    generator = place.generator(seed)
    logits = (spread * torch.randn(batch, vocabulary, generator=generator, device=place.device)).to(dtype)
    order = source.sample(range(batch + 5), batch)
    params = _rows(place, batch + 5, rules, order, [source.randrange(1 << 62) for _ in rules])
    seen = torch.randint(0, vocabulary, (50,), generator=generator, device=place.device).int()
    fresh = torch.zeros(batch + 5, vocabulary, dtype=torch.int16, device=place.device)
    for row in order:
        count_tokens(fresh, row, seen[:25], seen[20:])
    rows = torch.tensor([*order[:-1], -1], dtype=torch.int32, device=place.device)  # the last one is padding
    positions = torch.arange(100, 100 + batch, dtype=torch.int32, device=place.device)

    def tokens(kernel: object) -> torch.Tensor:
        out = torch.full((batch,), -77, dtype=torch.int32, device=place.device)
        last = torch.full((batch + 5,), -77, dtype=torch.int32, device=place.device)
        counts = fresh.clone()
        workspace = SamplingWorkspace.allocate(batch, vocabulary, place.device)
        (sample if kernel is sample else sample_reference)(
            logits, out, last, rows=rows, positions=positions, params=params, counts=counts, workspace=workspace
        )
        return torch.cat([out, last, counts.flatten().int()])

    got, wanted, again = tokens(sample), tokens(sample_reference), tokens(sample)
    differing = int((got[:batch] != wanted[:batch]).sum())
    record.check(name, float(not torch.equal(got, wanted)), 0.0, differing_tokens=differing)
    record.check(f"{name}, again", float(not same_bits(got, again)), 0.0)


def _rows(
    place: Place, rows: int, rules: Sequence[SamplingParams], order: Sequence[int], seeds: Sequence[int]
) -> SamplingRows:
    params = SamplingRows.allocate(rows, place.device)
    packed = [
        packed_row(
            row,
            rule,
            seed=seed,
            prompt_length=50,
            stop_ids=rule.stop_token_ids,
            count_row=row
            if (rule.repetition_penalty, rule.presence_penalty, rule.frequency_penalty) != (1, 0, 0)
            else -1,
        )
        for row, rule, seed in zip(order, rules, seeds, strict=True)
    ]
    params.write(torch.from_numpy(np.stack(packed)).to(place.device))
    return params


def _distribution(place: Place, record: Record, rule: SamplingParams) -> None:
    """Draw often from the same logits, and compare how often with how probable by chi-square."""
    vocabulary, batch, draws, spread = (10, 8, 8, 0.5) if place.toy else (4000, 512, 100, 1.5)
    logits = spread * torch.randn(vocabulary, generator=place.generator(SEED), device=place.device)
    params = _rows(place, batch, [rule] * batch, range(batch), [SEED + number for number in range(batch)])
    rows = torch.arange(batch, dtype=torch.int32, device=place.device)
    many = logits.expand(batch, -1).contiguous()
    workspace = SamplingWorkspace.allocate(batch, vocabulary, place.device)
    counts = torch.zeros(vocabulary, device=place.device)
    for position in range(draws):
        out, last = torch.empty_like(rows), torch.empty_like(rows)
        positions = torch.full_like(rows, position + 50)
        sample(many, out, last, rows=rows, positions=positions, params=params, workspace=workspace)
        counts += torch.bincount(out.clamp(min=0), minlength=vocabulary)
    probable = probabilities(logits.double().cpu(), rule)
    expected = probable * counts.sum().cpu()
    impossible = float(counts.cpu()[probable == 0].sum())
    common = expected >= 5
    rest = expected[~common].sum()
    observed = torch.cat([counts.cpu().double()[common], counts.cpu().double()[~common].sum()[None]])
    expected = torch.cat([expected[common], rest[None]])
    bins = expected > 0
    chi_square = float(((observed - expected)[bins].square() / expected[bins]).sum())
    freedom = max(int(bins.sum()) - 1, 1)
    # Wilson and Hilferty: the cube root of chi-square over its freedom is nearly normal.
    sigmas = ((chi_square / freedom) ** (1 / 3) - (1 - 2 / (9 * freedom))) / math.sqrt(2 / (9 * freedom))
    fields = {field: getattr(rule, field) for field in ("temperature", "top_k", "top_p", "min_p")}
    name = f"distribution: {described(fields)}"
    record.check(name, sigmas, SIGMAS, chi_square=chi_square, freedom=freedom, draws=int(counts.sum()))
    record.check(f"{name}, tokens that cannot be", impossible, 0.0)


def probabilities(logits: torch.Tensor, rule: SamplingParams) -> torch.Tensor:
    """What the rule makes of logits fp64 [vocabulary]; only temperature, top-k, top-p and min-p are looked at."""
    p = (logits / rule.temperature).softmax(-1)
    ranked, order = p.sort(descending=True)
    kept = torch.ones_like(ranked, dtype=torch.bool)
    if rule.top_k:
        kept[rule.top_k :] = False
    mass = ranked * kept
    kept &= (mass.cumsum(0) - mass) < rule.top_p * mass.sum() if rule.top_p < 1 else kept
    kept &= ranked >= rule.min_p * ranked[0]
    p = torch.zeros_like(p).index_put_((order,), ranked * kept)
    return p / p.sum()


def _invalid(place: Place, record: Record) -> None:
    """NaN and infinity among the logits are reported and become no token."""
    vocabulary = 300 if place.toy else 32_000
    logits = torch.randn(4, vocabulary, generator=place.generator(SEED), device=place.device)
    logits[0, 17] = float("nan")
    logits[1, vocabulary - 1] = float("inf")
    logits[2] = -float("inf")
    params = _rows(place, 4, [SamplingParams(temperature=t) for t in (0.0, 1.0, 1.0, 0.0)], range(4), range(4))
    rows = torch.arange(4, dtype=torch.int32, device=place.device)
    out, last = torch.full_like(rows, -77), torch.full_like(rows, -77)
    workspace = SamplingWorkspace.allocate(4, vocabulary, place.device)
    sample(logits, out, last, rows=rows, positions=rows + 5, params=params, workspace=workspace)
    wanted = [-1, -1, -1, int(logits[3].argmax())]
    record.check("sampling: invalid logits", float(out.tolist() != wanted), 0.0, tokens=out.tolist())
