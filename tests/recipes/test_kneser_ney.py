"""Kneser-Ney n-grams against the equations written out with dictionaries."""

from collections import Counter, defaultdict

import numpy as np
import pytest
from kneser_ney import KneserNey


class Oracle:
    """Chen & Goodman's equations, one n-gram at a time."""

    def __init__(self, tokens, vocabulary, order):
        self.vocabulary = vocabulary
        self.counts = {order: Counter(tuple(tokens[i : i + order]) for i in range(len(tokens) - order + 1))}
        for n in range(order - 1, 0, -1):
            before = defaultdict(set)
            for gram in self.counts[n + 1]:
                before[gram[1:]].add(gram[0])
            self.counts[n] = Counter({gram: len(found) for gram, found in before.items()})

    def discount(self, n, count):
        if not count:
            return 0
        of = Counter(self.counts[n].values())
        k = min(count, 3)
        if not all(of[i] for i in (1, 2, 3, 4)):
            return k / 2
        y = of[1] / (of[1] + 2 * of[2])
        d = k - (k + 1) * y * of[k + 1] / of[k]
        return d if 0 < d < k else k / 2

    def probability(self, context, token):
        n = len(context) + 1
        lower = self.probability(context[1:], token) if context else 1 / self.vocabulary
        follow = {g[-1]: c for g, c in self.counts[n].items() if g[:-1] == context}
        if not follow:
            return lower
        total = sum(follow.values())
        left_over = sum(self.discount(n, c) for c in follow.values()) / total
        count = follow.get(token, 0)
        return (count - self.discount(n, count)) / total + left_over * lower


def text(length, seed, vocabulary=9):
    """A Markov chain, so that n-grams recur."""
    rng = np.random.default_rng(seed)
    rows = rng.dirichlet(np.full(vocabulary, 0.3), size=vocabulary)
    tokens = [0]
    while len(tokens) < length:
        tokens.append(int(rng.choice(vocabulary, p=rows[tokens[-1]])))
    return tokens


@pytest.mark.parametrize("order", [1, 2, 3, 5])
@pytest.mark.parametrize("length", [12, 400])
def test_equals_the_equations(order, length):
    train, other = text(length, seed=1), text(60, seed=2)
    oracle, model = Oracle(train, 9, order), KneserNey(np.array(train), 9, order)
    expected = [
        oracle.probability(tuple(other[max(0, i - order + 1) : i]), other[i]) for i in range(len(other))
    ]
    np.testing.assert_allclose(model.probabilities(np.array(other)), expected, rtol=1e-12)
    np.testing.assert_array_equal(
        model.probabilities(np.array(other), 7), model.probabilities(np.array(other))[7:]
    )


def test_probabilities_sum_to_one_after_any_context():
    model = KneserNey(np.array(text(400, seed=3)), 9, 4)
    for context in ([0, 1, 2], [8, 8, 8], [5, 0, 5]):
        p = [model.probabilities(np.array([*context, token]), 3)[0] for token in range(9)]
        assert sum(p) == pytest.approx(1, abs=1e-12)
        assert min(p) > 0


def test_what_does_not_fit_is_refused():
    with pytest.raises(ValueError, match="lower the order"):
        KneserNey(np.arange(10), 50257, 5)
    with pytest.raises(ValueError, match="token ids"):
        KneserNey(np.array([0, 9, 1]), 9, 2)
