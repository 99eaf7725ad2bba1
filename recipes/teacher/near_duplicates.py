"""Near-duplicates among documents.

hashes_of = WordHashes()
words = [hashes_of(text) for text in texts]
copies = near_duplicates(words)  # positions to drop; the first of each kind stays
"""

from collections import defaultdict
from collections.abc import Sequence

import numpy as np
from tqdm import tqdm

from spiking_mamba.data.contamination import MULTIPLIER, mix, ngram_hashes


def near_duplicates(
    documents: Sequence[np.ndarray], threshold: float = 0.7, n: int = 5, bands: int = 16, rows: int = 4
) -> set[int]:
    """Positions of documents whose sets of word n-grams are like an earlier, kept document's.

    MinHash with `bands` bands of `rows` values finds candidates (a pair of Jaccard similarity s is found
    with probability 1 - (1 - s^rows)^bands: 0.99 at 0.7, 0.64 at 0.5); the similarity of each candidate is
    then computed exactly and must be at least `threshold`. Documents shorter than n words are left alone.
    """
    salts = mix(np.arange(1, bands * rows + 1, dtype=np.uint64) * MULTIPLIER)
    buckets: list[dict[bytes, list[int]]] = [defaultdict(list) for _ in range(bands)]
    dropped: set[int] = set()
    for index, words in enumerate(tqdm(documents, desc="near-duplicates", unit="document", disable=None)):
        grams = np.unique(ngram_hashes(words, n))
        if not len(grams):
            continue
        # the hashes are well mixed: exclusive or and a multiplication by an odd number permute them enough
        signature = np.array([((grams ^ salt) * MULTIPLIER).min() for salt in salts])
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
