"""Interpolated modified Kneser-Ney n-grams over token ids: what counting alone can do, beside a model.

Chen & Goodman, "An Empirical Study of Smoothing Techniques for Language Modeling" (1998), equations of its
section 3. With counts c (raw ones of the highest order; of the lower orders the number of distinct tokens
that precede the n-gram), h a context and h' the context without its first token:

    p_n(w | h) = max(c(hw) - D(c(hw)), 0) / c(h.) + gamma(h) p_{n-1}(w | h')
    gamma(h)   = (D_1 N_1(h.) + D_2 N_2(h.) + D_3+ N_3+(h.)) / c(h.)
    p_0        = 1 / vocabulary;  p_n(w | h) = p_{n-1}(w | h') for a context never seen
"""

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class _Order:
    keys: np.ndarray  # [n-grams] int64, sorted: token ids as digits of a number in base `vocabulary`
    discounted: np.ndarray  # [n-grams] float64: (c - D(c)) / c(h.)
    contexts: np.ndarray  # [contexts] int64, sorted
    gamma: np.ndarray  # [contexts] float64


class KneserNey:
    """`order`-grams counted over `tokens`, one stream of integer ids below `vocabulary`.

    Keys are 64-bit, so vocabulary ** order must be below 2**63 (4096 entries: order 5). Raises ValueError.
    """

    def __init__(self, tokens: np.ndarray, vocabulary: int, order: int = 5) -> None:
        if order < 1 or vocabulary**order >= 2**63:
            raise ValueError(
                f"order {order} with {vocabulary} entries does not fit 64 bits; lower the order."
            )
        tokens = np.asarray(tokens, dtype=np.int64)
        if len(tokens) < order or tokens.min() < 0 or tokens.max() >= vocabulary:
            raise ValueError(f"{order}-grams need at least {order} token ids in [0, {vocabulary}).")
        self.vocabulary, self.order = vocabulary, order
        self._orders: list[_Order] = []
        keys, counts = np.unique(_windows(tokens, order, vocabulary), return_counts=True)
        for n in range(order, 0, -1):
            self._orders.insert(0, _smooth(keys, counts, vocabulary))
            keys, counts = np.unique(keys % vocabulary ** (n - 1), return_counts=True)

    def probabilities(self, tokens: np.ndarray, first: int = 0) -> np.ndarray:
        """p(token | the order - 1 tokens before it), float64 [len(tokens) - first].

        The tokens before `first` only serve as context; with fewer before it, a token's context is shorter.
        """
        tokens = np.asarray(tokens, dtype=np.int64)
        p = np.full(len(tokens), 1 / self.vocabulary)
        for n, order in enumerate(self._orders, 1):
            if len(tokens) < n:
                break
            keys = _windows(tokens, n, self.vocabulary)
            here = p[n - 1 :]  # a view: positions with n - 1 tokens before them
            gamma = _look_up(order.contexts, order.gamma, keys // self.vocabulary, 1.0)
            here *= gamma
            here += _look_up(order.keys, order.discounted, keys, 0.0)
        return p[first:]


def _windows(tokens: np.ndarray, n: int, vocabulary: int) -> np.ndarray:
    count = len(tokens) - n + 1
    keys = np.zeros(count, np.int64)
    for offset in range(n):
        keys = keys * vocabulary + tokens[offset : offset + count]
    return keys


def _look_up(keys: np.ndarray, values: np.ndarray, wanted: np.ndarray, absent: float) -> np.ndarray:
    at = np.minimum(np.searchsorted(keys, wanted), len(keys) - 1)
    return np.where(keys[at] == wanted, values[at], absent)


def _discounts(counts: np.ndarray) -> np.ndarray:
    """D for a count of 0, 1, 2 and 3 or more; where the counts of counts give none, 1/2, 1, 3/2."""
    n = np.bincount(np.minimum(counts, 5), minlength=6).astype(float)
    discounts = np.array([0, 0.5, 1.0, 1.5])
    if n[1:5].all():
        y = n[1] / (n[1] + 2 * n[2])
        exact = [k - (k + 1) * y * n[k + 1] / n[k] for k in (1, 2, 3)]
        discounts[1:] = [
            d if 0 < d < k else f for k, d, f in zip((1, 2, 3), exact, discounts[1:], strict=True)
        ]
    return discounts


def _smooth(keys: np.ndarray, counts: np.ndarray, vocabulary: int) -> _Order:
    taken = _discounts(counts)[np.minimum(counts, 3)]
    prefixes = keys // vocabulary
    starts = np.flatnonzero(np.diff(prefixes, prepend=-1))
    total = np.add.reduceat(counts, starts).astype(float)
    sizes = np.diff(starts, append=len(keys))
    gamma = np.add.reduceat(taken, starts) / total
    return _Order(keys, (counts - taken) / np.repeat(total, sizes), prefixes[starts], gamma)
