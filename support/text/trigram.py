"""The yardstick that keeps everyone honest: a trigram, made from the same training text."""

import numpy as np


def trigram_loss(train: np.ndarray, test: np.ndarray, V: int) -> float:
    """Mean cross-entropy in nats of test[1:] under a trigram fitted to train, with Witten-Bell interpolation:

        p(w | h) = (count(h w) + types(h) · p(w | h')) / (count(h) + types(h)),    h' = h without its first token,

    down to p(w) = 1/V; types(h) is the number of different tokens seen after h (Chen and Goodman 1999, section 2.5).
    """
    p = np.full(len(test) - 1, 1 / V)
    for n in (1, 2, 3):
        query, (seen, count) = ngrams(test, n, V), np.unique(ngrams(train, n, V), return_counts=True)
        histories, which = np.unique(seen // V, return_inverse=True)
        count_hw = lookup(query, seen, count)
        count_h = lookup(query // V, histories, np.bincount(which, count))
        types_h = lookup(query // V, histories, np.bincount(which))
        p = np.where(count_h > 0, (count_hw + types_h * p) / np.maximum(count_h + types_h, 1), p)
    return float(-np.log(p).mean())


def ngrams(text: np.ndarray, n: int, V: int) -> np.ndarray:
    """The n-gram that ends at each token but the first, as a number to base V; before the first stands itself."""
    text = np.concatenate([text[:1], text]).astype(np.int64)
    return sum(text[2 - k:len(text) - k] * V ** k for k in range(n))


def lookup(query: np.ndarray, keys: np.ndarray, values: np.ndarray) -> np.ndarray:
    """The value of each query, 0 where it isn't among the sorted keys."""
    place = np.searchsorted(keys, query).clip(max=len(keys) - 1)
    return np.where(keys[place] == query, values[place], 0)
