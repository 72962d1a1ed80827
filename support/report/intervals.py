"""A paired t-test: how far a method is behind another one, with a 95 % confidence interval."""

import functools
import math
import statistics
from typing import NamedTuple

import numpy as np

CONFIDENCE = 0.95


class Interval(NamedTuple):
    """A mean difference, and the ends of its confidence interval."""

    mean: float
    low: float
    high: float

    @property
    def is_level(self) -> bool:
        """Whether the interval contains 0."""
        return self.low <= 0 <= self.high


@functools.cache
def t_quantile(degrees: int) -> float:
    """The t for which |T| <= t has the probability CONFIDENCE, in Student's t-distribution.

    With T = √degrees · tan θ, the density of θ is proportional to cos(θ)^(degrees − 1).
    t_quantile(2) -> 4.303
    """
    theta = np.linspace(0, math.pi / 2, 1_000_001)
    middles = (theta[1:] + theta[:-1]) / 2
    probability = np.cumsum(np.cos(middles) ** (degrees - 1))
    position = np.searchsorted(probability / probability[-1], CONFIDENCE)
    return math.sqrt(degrees) * math.tan(theta[position + 1])


def paired_interval(differences: list[float]) -> Interval:
    """The paired t-interval: mean ± t · s / √n. It is infinite for a single difference.

    paired_interval([1.0, 2.0, 3.0]) -> 2 ± 4.303 · 1 / √3
    """
    mean = statistics.mean(differences)
    n = len(differences)
    if n == 1:
        return Interval(mean, -math.inf, math.inf)
    half = t_quantile(n - 1) * statistics.stdev(differences) / math.sqrt(n)
    return Interval(mean, mean - half, mean + half)


Scores = dict[tuple[int, str], float]  # test perplexity by seed and user


def behind(ours: Scores, theirs: Scores) -> Interval:
    """How much higher our mean perplexity is, as a fraction of theirs.

    Paired by seed and user; pairs that one of the two lacks are left out.
    """
    pairs = [pair for pair in ours if pair in theirs]
    interval = paired_interval([ours[pair] - theirs[pair] for pair in pairs])
    scale = statistics.mean(theirs[pair] for pair in pairs)
    return Interval(*(number / scale for number in interval))
