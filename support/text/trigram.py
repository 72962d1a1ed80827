"""A trigram language model of the training text: the baseline of every result.

Read this file only to check its smoothing. tests/test_data.py computes an
example by hand.
"""

import numpy as np


def trigram_loss(train: np.ndarray, test: np.ndarray, vocab_size: int) -> float:
    """Mean cross-entropy in nats of test[1:] under a trigram that is fitted to train.

    Witten-Bell interpolation (Chen and Goodman 1999, section 2.5):

        p(w | h) = (count(h w) + types(h) · p(w | h')) / (count(h) + types(h))

    h' is the history h without its first token; the last p is 1 / vocab_size; types(h) is the
    number of different tokens that follow h in train.
    """
    p = np.full(len(test) - 1, 1 / vocab_size)  # of each target
    for n in (1, 2, 3):
        known, counts = np.unique(ngrams(train, n, vocab_size), return_counts=True)
        histories, history_of = np.unique(known // vocab_size, return_inverse=True)
        history_counts = np.bincount(history_of, weights=counts)
        history_types = np.bincount(history_of)

        tested = ngrams(test, n, vocab_size)
        history = tested // vocab_size
        count_hw = lookup(tested, known, counts)
        count_h = lookup(history, histories, history_counts)
        types_h = lookup(history, histories, history_types)

        total = np.maximum(count_h + types_h, 1)  # avoids division by 0
        interpolated = (count_hw + types_h * p) / total
        p = np.where(count_h > 0, interpolated, p)
    return float(-np.log(p).mean())


def ngrams(tokens: np.ndarray, n: int, vocab_size: int) -> np.ndarray:
    """The n-grams that end at each token except the first, as numbers in base vocab_size:
    (N,) -> (N - 1,). The first token is also used as the one before it.

    ngrams([3, 1, 4], n=2, vocab_size=10) -> [31, 14]
    """
    padded = np.concatenate([tokens[:1], tokens])
    padded = padded.astype(np.int64)
    numbers = np.zeros(len(tokens) - 1, np.int64)
    for k in range(n):
        start = 3 - n + k
        part = padded[start : start + len(numbers)]
        numbers = numbers * vocab_size + part
    return numbers


def lookup(queries: np.ndarray, keys: np.ndarray, values: np.ndarray) -> np.ndarray:
    """The value of each query; 0 if it is not among the keys, which are sorted."""
    place = np.searchsorted(keys, queries)
    place = place.clip(max=len(keys) - 1)
    return np.where(keys[place] == queries, values[place], 0)
