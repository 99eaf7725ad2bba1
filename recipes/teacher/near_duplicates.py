"""Near-duplicates among documents, and overlap with a reference text.

ids = WordIds()
words = [ids(text) for text in texts]
copies = near_duplicates(words)                    # positions to drop; the first of each kind stays
known = ngram_hashes(ids(reference), 13)
overlaps = np.isin(ngram_hashes(words[0], 13), known).any()
"""

import re
from collections import defaultdict
from collections.abc import Sequence

import numpy as np
from tqdm import tqdm

_WORD = re.compile(r"[a-z0-9]+")
_MULTIPLIER = np.uint64(0x9E3779B97F4A7C15)


class WordIds:
    """Text to an array [words] of uint64: lower-case letters and digits, a number for each distinct word."""

    def __init__(self) -> None:
        self._known: dict[str, int] = {}

    def __call__(self, text: str) -> np.ndarray:
        known = self._known
        words = _WORD.findall(text.lower())
        return np.array([known.setdefault(word, len(known) + 1) for word in words], dtype=np.uint64)


def _mix(values: np.ndarray) -> np.ndarray:
    """splitmix64's finalizer: a bijection of 64-bit integers that scatters them."""
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return values ^ (values >> np.uint64(31))


def ngram_hashes(words: np.ndarray, n: int) -> np.ndarray:
    """64-bit hashes of the word n-grams, in order: [words] -> [max(0, words - n + 1)]."""
    count = len(words) - n + 1
    if count < 1:
        return np.empty(0, np.uint64)
    hashes = np.zeros(count, np.uint64)
    for offset in range(n):
        hashes = _mix(hashes * _MULTIPLIER + words[offset : offset + count])
    return hashes


def near_duplicates(
    documents: Sequence[np.ndarray], threshold: float = 0.7, n: int = 5, bands: int = 16, rows: int = 4
) -> set[int]:
    """Positions of documents whose sets of word n-grams are like an earlier, kept document's.

    MinHash with `bands` bands of `rows` values finds candidates (a pair of Jaccard similarity s is found
    with probability 1 - (1 - s^rows)^bands: 0.99 at 0.7, 0.64 at 0.5); the similarity of each candidate is
    then computed exactly and must be at least `threshold`. Documents shorter than n words are left alone.
    """
    salts = _mix(np.arange(1, bands * rows + 1, dtype=np.uint64) * _MULTIPLIER)
    buckets: list[dict[bytes, list[int]]] = [defaultdict(list) for _ in range(bands)]
    dropped: set[int] = set()
    for index, words in enumerate(tqdm(documents, desc="near-duplicates", unit="document", disable=None)):
        grams = np.unique(ngram_hashes(words, n))
        if not len(grams):
            continue
        # the hashes are well mixed: exclusive or and a multiplication by an odd number permute them enough
        signature = np.array([((grams ^ salt) * _MULTIPLIER).min() for salt in salts])
        keys = [signature[i : i + rows].tobytes() for i in range(0, len(signature), rows)]
        candidates = sorted(
            {c for bucket, key in zip(buckets, keys, strict=True) for c in bucket.get(key, ())}
        )
        for candidate in candidates:
            other = np.unique(ngram_hashes(documents[candidate], n))
            common = len(np.intersect1d(grams, other, assume_unique=True))
            if common >= threshold * (len(grams) + len(other) - common):
                dropped.add(index)
                break
        else:
            for bucket, key in zip(buckets, keys, strict=True):
                bucket[key].append(index)
    return dropped
