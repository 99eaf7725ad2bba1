"""What is thrown out of a text that a model writes: loops, copies, and whatever is evaluated."""

import numpy as np
import torch

__all__ = ["Evaluated", "Filter", "window_hashes"]

_ODD = (-7046029254386353131, -4417276706812531889)  # 0x9E3779B97F4A7C15 and 0xC2B2AE3D27D4EB4F, signed


def window_hashes(tokens: torch.Tensor, n: int) -> torch.Tensor:
    """64-bit hashes of all windows of n tokens, ``[..., L] -> [..., L - n + 1]`` int64."""
    count = tokens.shape[-1] - n + 1
    hashes = torch.zeros_like(tokens[..., :count])
    for offset in range(n):
        hashes = (hashes + tokens[..., offset : offset + count] + 1) * _ODD[0]  # wraps around
        hashes = hashes ^ ((hashes >> 29) & (2**35 - 1))
    return hashes * _ODD[1]


class Evaluated:
    """The windows of n tokens of evaluated texts.

    ``spiking_mamba.data.contamination`` looks for words, in texts of any tokenizer and on the processor. What
    a model writes is token ids on the GPU, thousands a step: there it would have to be decoded and cut into
    words first; and words cannot be told from ids.

    Args:
        tokens: ``[m]`` uint16, texts behind one another, each ended by ``end``.
    """

    def __init__(self, tokens: np.ndarray, n: int, end: int, device: str | torch.device) -> None:
        self.n = n
        flat = torch.from_numpy(tokens.astype(np.int64))
        hashes = window_hashes(flat, n)
        inside = torch.from_numpy(np.convolve(tokens == end, np.ones(n), "valid") == 0)
        self.known = hashes[inside].unique().to(device)  # sorted

    def holds(self, tokens: torch.Tensor) -> torch.Tensor:
        """Whether a known window begins at a position, ``[B, L] -> [B, L]`` bool."""
        hashes = window_hashes(tokens, self.n)
        place = torch.searchsorted(self.known, hashes).clamp(max=len(self.known) - 1)
        return torch.nn.functional.pad(self.known[place] == hashes, (0, self.n - 1))


class Filter:
    """Keeps the documents of a batch that are worth reading.

    Args:
        evaluated: documents that share a window with these are dropped.
        shortest: tokens of a document, at least.
        distinct: a document is a loop if less than this share of its windows of ``loop`` tokens differ.

    Attributes:
        counts: documents and tokens so far: seen, kept, and dropped by reason.
    """

    def __init__(
        self, evaluated: Evaluated, shortest: int = 32, distinct: float = 0.75, loop: int = 8
    ) -> None:
        self.evaluated, self.shortest, self.distinct, self.loop = evaluated, shortest, distinct, loop
        self.seen: set[int] = set()
        self.counts: dict[str, int] = {}

    def _count(self, name: str, documents: torch.Tensor, lengths: torch.Tensor) -> None:
        self.counts[f"{name} documents"] = self.counts.get(f"{name} documents", 0) + int(documents.sum())
        self.counts[f"{name} tokens"] = self.counts.get(f"{name} tokens", 0) + int(lengths[documents].sum())

    def __call__(self, tokens: torch.Tensor, starts: torch.Tensor) -> torch.Tensor:
        """The tokens that stay, in order, ``[n]`` int64.

        Args:
            tokens: ``[B, L]`` int64. starts: ``[B, L]`` bool, true at every row's first token.
        """
        numbers = starts.flatten().cumsum(0) - 1
        count = int(numbers[-1]) + 1
        lengths = torch.bincount(numbers, minlength=count)
        reasons = {
            "short": lengths < self.shortest,
            "looping": self._loops(tokens, numbers.view_as(tokens), count),
            "evaluated": self._marked(self.evaluated.holds(tokens).flatten(), numbers, count),
            "repeated": self._copies(tokens, numbers, lengths),
        }
        keeps = torch.ones(count, dtype=torch.bool, device=tokens.device)
        self._count("seen", keeps, lengths)
        for name, drops in reasons.items():
            self._count(name, keeps & drops, lengths)
            keeps &= ~drops
        self._count("kept", keeps, lengths)
        return tokens.flatten()[keeps[numbers]]

    @staticmethod
    def _marked(marks: torch.Tensor, numbers: torch.Tensor, count: int) -> torch.Tensor:
        return torch.bincount(numbers[marks], minlength=count) > 0

    def _loops(self, tokens: torch.Tensor, numbers: torch.Tensor, count: int) -> torch.Tensor:
        """Whether too few windows of a document differ."""
        hashes = window_hashes(tokens, self.loop)
        inside = numbers[:, : hashes.shape[1]]
        whole = inside == numbers[:, self.loop - 1 :]  # windows that end in the document they begin in
        keys = hashes[whole] ^ (inside[whole] * _ODD[1])
        documents = inside[whole]
        order = keys.argsort()
        first = torch.ones_like(keys, dtype=torch.bool)
        first[1:] = keys[order][1:] != keys[order][:-1]
        all_, different = (torch.bincount(d, minlength=count) for d in (documents, documents[order][first]))
        return different < self.distinct * all_

    def _copies(self, tokens: torch.Tensor, numbers: torch.Tensor, lengths: torch.Tensor) -> torch.Tensor:
        """Whether a document has been seen before, in this batch or an earlier one."""
        begins = lengths.cumsum(0) - lengths
        place = torch.arange(tokens.numel(), device=tokens.device) - begins[numbers]
        mixed = window_hashes((tokens.flatten() * 65536 + place)[:, None], 1)[:, 0]
        sums = torch.zeros(len(lengths), dtype=torch.long, device=tokens.device).index_add_(0, numbers, mixed)
        copies = []
        for value in sums.tolist():
            copies.append(value in self.seen)
            self.seen.add(value)
        return torch.tensor(copies, dtype=torch.bool, device=tokens.device)
