"""The distribution a token is drawn from: temperature and filters, and the inversion of its CDF.

The CDF runs in vocabulary order. The filters are thresholds on the probability, never ranks, so tokens of equal
probability are kept or dropped together and no result depends on how a sort breaks ties. Every operation works on a row
alone, so no row depends on the others in the batch.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from preble.sampling import SamplingParams

BLOCK = 256
"""Tokens summed at once by the inverse CDF: first the block is found, then the token in it."""

NUCLEUS = 128
"""How many of the most probable tokens are ranked to find what `top_p` keeps; beyond these, weights are bisected."""

GROUP = 32
"""Tokens of which only the largest is looked at to find the groups that hold the largest of all."""

LOWEST, LEAST = -80.0, 2e-35
"""Scaled logits this far below the largest get no weight: exp is ten times slower where it underflows."""

COOLEST, HOTTEST = 1e-30, 1e30
"""Temperatures beyond these act alike, and fp32 can't divide by them."""


def weights(logits: Tensor, peaks: Tensor, rows: Sequence[SamplingParams]) -> Tensor:
    """Probabilities relative to the largest, after temperature, `top_k`, `top_p` and `min_p`; 0 for dropped tokens.

    Args:
        logits: fp32 [G, vocabulary], biased and penalised; overwritten and returned.
        peaks: the largest of each row, fp32 [G], finite.
        rows: the parameters of each row; temperatures above 0.
    """
    temperatures = _column([min(max(params.temperature, COOLEST), HOTTEST) for params in rows], logits)
    kept = logits.sub_(peaks.unsqueeze(1)).div_(temperatures).clamp_(min=LOWEST).exp_()
    smallest = _column([max(params.min_p, LEAST) for params in rows], logits)
    ranked = [row for row, params in enumerate(rows) if params.top_k or params.top_p < 1.0]
    if ranked:
        part = kept if len(ranked) == len(rows) else kept[ranked]
        bound = _smallest_ranked(part, [rows[row] for row in ranked])
        smallest[ranked] = torch.maximum(smallest[ranked], bound)
    return kept.mul_(_at_least(kept, smallest))


def draw(weights: Tensor, uniforms: Sequence[float]) -> list[int]:
    """Invert the CDF of each row: the first token, in vocabulary order, at which it exceeds the uniform number.

    Args:
        weights: fp32 [G, vocabulary], at least one positive in each row; need not sum to 1.
        uniforms: one number in [0, 1) per row.
    """
    vocabulary = weights.shape[1]
    edges = block_sums(weights).cumsum(1)
    target = _column(uniforms, weights, torch.float64) * edges[:, -1:]
    block = _first_above(edges, target)
    target -= torch.where(block > 0, edges.gather(1, (block - 1).clamp_(min=0)), 0.0)
    columns = block * BLOCK + torch.arange(BLOCK, device=weights.device)
    inside = weights.gather(1, columns.clamp(max=vocabulary - 1)).masked_fill_(columns >= vocabulary, 0.0)
    token = block * BLOCK + _first_above(inside.cumsum(1, dtype=torch.float64), target)
    return token.squeeze(1).tolist()


def largest(values: Tensor, count: int) -> Tensor:
    """The `count` largest of each row, fp32 [G, count], in descending order: `topk`, three times as fast.

    They lie in the `count` groups with the largest maxima, so no others are searched.
    """
    rows, vocabulary = values.shape
    groups = vocabulary // GROUP
    if 2 * count > groups:
        return values.topk(count, dim=1).values
    grouped = values[:, : groups * GROUP].reshape(rows * groups, GROUP)
    best = grouped.amax(1).view(rows, groups).topk(count, dim=1, sorted=False).indices
    best += torch.arange(rows, device=values.device).unsqueeze(1) * groups
    candidates = grouped.index_select(0, best.view(-1)).view(rows, count * GROUP)
    if groups * GROUP < vocabulary:
        candidates = torch.cat([candidates, values[:, groups * GROUP :]], 1)
    return candidates.topk(count, dim=1).values


def block_sums(weights: Tensor) -> Tensor:
    """Sums over blocks of the vocabulary, float64 [G, ceil(vocabulary / BLOCK)]."""
    whole = weights.shape[1] // BLOCK
    sums: Tensor = weights[:, : whole * BLOCK].view(len(weights), whole, BLOCK).sum(2, dtype=torch.float64)
    if whole * BLOCK == weights.shape[1]:
        return sums
    return torch.cat([sums, weights[:, whole * BLOCK :].sum(1, keepdim=True, dtype=torch.float64)], 1)


def _smallest_ranked(weights: Tensor, rows: Sequence[SamplingParams]) -> Tensor:
    """The smallest weight that `top_k` and then `top_p` keep, fp32 [G, 1]."""
    vocabulary = weights.shape[1]
    ranks = [min(params.top_k or vocabulary, vocabulary) for params in rows]
    shares = [params.top_p for params in rows]
    limits = [rank for rank in ranks if rank < vocabulary]
    ranking = largest(weights, min(vocabulary, max([1 if min(shares) == 1.0 else NUCLEUS, *limits])))
    smallest = torch.zeros_like(ranking[:, :1])
    if limits:
        index = torch.tensor(ranks, device=weights.device).unsqueeze(1)
        kth = ranking.gather(1, (index - 1).clamp_(max=ranking.shape[1] - 1))
        smallest = torch.where(index < vocabulary, kth, smallest)
    if min(shares) == 1.0:
        return smallest
    if limits:
        weights = weights * _at_least(weights, smallest)
    share = _column(shares, weights, torch.float64)
    wanted = share * block_sums(weights).sum(1, keepdim=True)
    head = ranking[:, :NUCLEUS]
    last = torch.searchsorted(head.cumsum(1, dtype=torch.float64), wanted)  # the first rank at which it is reached
    nucleus = head.gather(1, last.clamp(max=head.shape[1] - 1))
    wide = ((last == head.shape[1]) & (share < 1.0)).squeeze(1).nonzero().squeeze(1)
    if len(wide):
        nucleus[wide] = _bisect(weights[wide], wanted[wide])
    return torch.where(share < 1.0, torch.maximum(smallest, nucleus), smallest)


def _bisect(weights: Tensor, wanted: Tensor) -> Tensor:
    """The largest fp32 number [G, 1] such that the weights from it on sum to at least `wanted`, float64 [G, 1].

    Positive floats are ordered like their bits, so 30 halvings of the bits between 0 and 1 are exact.
    """
    low = torch.zeros_like(wanted, dtype=torch.int32)
    high = torch.ones_like(wanted, dtype=torch.float32).view(torch.int32) + 1
    for _ in range(30):
        middle = (low + high) // 2
        above = _at_least(weights, middle.view(torch.float32)).mul_(weights)
        enough = block_sums(above).sum(1, keepdim=True) >= wanted
        low, high = torch.where(enough, middle, low), torch.where(enough, high, middle)
    return low.view(torch.float32)


def _first_above(cumulative: Tensor, target: Tensor) -> Tensor:
    """Index [G, 1] of the first entry above the target, which rounding may have pushed past the last one."""
    return torch.searchsorted(cumulative, torch.minimum(target, cumulative[:, -1:] * (1 - 2.0**-53)), right=True)


def _at_least(weights: Tensor, smallest: Tensor) -> Tensor:
    """1.0 where a weight is at least `smallest`, fp32 [G, 1], else 0.0; as floats, since bools multiply slowly."""
    return weights.clone().ge_(smallest)


def _column(values: Sequence[float], like: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """One value per row, [G, 1]."""
    return torch.tensor(values, dtype=dtype, device=like.device).unsqueeze(1)
