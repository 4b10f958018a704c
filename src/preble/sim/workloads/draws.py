"""What a workload leaves to chance: lengths, times, and which prefix comes next."""

from __future__ import annotations

from dataclasses import dataclass
from statistics import NormalDist

import numpy as np
from numpy.typing import NDArray

SHUFFLES = 256
"""Orders of the prefixes' lengths to choose from."""


@dataclass(frozen=True, slots=True)
class Skewed:
    """Lognormal numbers within bounds: most are below the mean and a few far above, as lengths and times of people,
    texts and tools are."""

    mean: float
    """Before the bounds cut it."""
    sigma: float
    """Standard deviation of the logarithm. 0.2 is nearly symmetric, 1 has a mean 1.6 times the median."""
    low: float
    high: float

    @property
    def _mu(self) -> float:
        """Mean of the logarithm."""
        return float(np.log(self.mean)) - self.sigma**2 / 2

    def draw(self, generator: np.random.Generator) -> float:
        """One of them."""
        return min(max(generator.lognormal(self._mu, self.sigma), self.low), self.high)

    def draw_tokens(self, generator: np.random.Generator) -> int:
        """One of them, as a whole number."""
        return round(self.draw(generator))

    def spread(self, weights: NDArray[np.float64], generator: np.random.Generator) -> list[int]:
        """Whole numbers, one per weight, whose weighted mean is about `mean`.

        They are the quantiles of the distribution in random order. Where few prefixes take most requests, the lengths
        of those few make the mean, and seeds would give workloads of very different size; so the order is the best
        of `SHUFFLES` in this respect.

        Args:
            weights: float64 [count]: how often each is used. They add up to 1.
            generator: Where chance comes from.
        """
        count = len(weights)
        normal = NormalDist(self._mu, self.sigma)
        values = np.exp([normal.inv_cdf((rank + 0.5) / count) for rank in range(count)])
        values = np.clip(values * (self.mean / values.mean()), self.low, self.high)
        orders = (generator.permutation(values) for _ in range(SHUFFLES))
        best = min(orders, key=lambda order: abs(float(order @ weights) - self.mean))
        return [int(value) for value in np.rint(best)]


class Draws:
    """The generators of one workload, and the popularity of its prefixes.

    The prefixes' lengths, the choice among them and all the rest come from generators of their own, so that what one
    part draws never moves another.
    """

    def __init__(self, seed: np.random.SeedSequence, prefixes: int, popularity: float) -> None:
        """
        Args:
            seed: Root of the three generators.
            prefixes: How many there are to choose from, at least 1.
            popularity: Exponent of Zipf's law: the prefix of rank k is drawn in proportion to k ** -popularity.
        """
        self.prefixes, self._choice, self.sessions = (np.random.default_rng(child) for child in seed.spawn(3))
        weights = np.arange(1, prefixes + 1) ** -float(popularity)
        self.weights: NDArray[np.float64] = weights / weights.sum()
        """float64 [prefixes]: the share of each, the most popular first."""
        self._cumulative = np.cumsum(self.weights)

    def prefix(self) -> int:
        """The rank of the next prefix to be used, from 0."""
        rank = int(np.searchsorted(self._cumulative, self._choice.random(), side="right"))
        return min(rank, len(self._cumulative) - 1)  # the sum may round to a little below 1

    def lengths(self, distribution: Skewed, weights: NDArray[np.float64] | None = None) -> list[int]:
        """One length per prefix, or per weight. The mean of the distribution is that over requests."""
        return distribution.spread(self.weights if weights is None else weights, self.prefixes)

    def turns(self, mean: float, most: int) -> int:
        """How many requests a session has: geometric, as if each one were the last with the same chance."""
        return min(int(self.sessions.geometric(1 / mean)), most)
