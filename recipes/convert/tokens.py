"""Training rows out of streams of tokens that stay on the device.

A stream is documents behind one another with the end-of-text token between them. A row is that token and a
window of a stream; what is evaluated begins with it too.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from spiking_mamba.common.errors import DataError

__all__ = ["END", "PASSAGES", "Mixture", "Stream", "passage_rows", "read_tokens"]

END = 0  # SmolLM2's <|endoftext|>
PASSAGES = {"openwebtext-passages": "web", "wikipedia-passages": "wiki"}  # held-out text


def read_tokens(paths: Sequence[str | Path], vocabulary: int = 2**16) -> np.ndarray:
    """The uint16 tokens of files, one after the other.

    Raises:
        DataError: a file is not there or is of no uint16 tokens, or a token lies outside the vocabulary.
    """
    parts = []
    for path in paths:
        try:
            if Path(path).stat().st_size % 2:
                raise DataError(f"{path} has an odd number of bytes: it is no file of uint16 tokens.")
            tokens = np.fromfile(path, dtype=np.uint16)
        except OSError as error:
            raise DataError(f"{path} cannot be read: {error.strerror}.") from error
        if len(tokens) and (most := int(tokens.max())) >= vocabulary:
            raise DataError(f"{path} holds token {most}, outside the vocabulary of {vocabulary}.")
        parts.append(tokens)
    return np.concatenate(parts)


def passage_rows(data: Any, kind: str, length: int = 512) -> torch.Tensor:
    """Rows of a kind of passages, each an end of text and a window of them, int64 ``[rows, length]``.

    What is less than a row at the end is left out.

    Args:
        data: ``evaluated.npz``, see ``prepare.py``. kind: of ``PASSAGES``.
        length: of a row, its first token included.

    Raises:
        DataError: there are none of that kind.
    """
    if kind not in data:
        raise DataError(f"There are no {kind} in the data: prepare.py writes them.")
    rows = len(data[kind]) // (length - 1)
    windows = torch.from_numpy(data[kind][: rows * (length - 1)].astype(np.int64)).view(rows, length - 1)
    return torch.nn.functional.pad(windows, (1, 0), value=END)


class Stream:
    """Windows of a stream in an order drawn anew for every pass over it.

    Args:
        tokens: ``[n]`` uint16. length: of a row, its first token included. seed: of the orders.
    """

    def __init__(self, tokens: np.ndarray, length: int, seed: int, device: str | torch.device) -> None:
        self.window, self.seed = length - 1, seed
        self.count = len(tokens) // self.window
        if not self.count:
            raise ValueError(f"{len(tokens)} tokens are less than a row of {length}.")
        whole = np.ascontiguousarray(tokens[: self.count * self.window]).view(np.int16)
        self.rows = torch.from_numpy(whole).view(self.count, self.window).to(device)
        self.epoch, self.order = -1, np.empty(0, np.int64)

    def _place(self, number: int) -> int:
        epoch, place = divmod(number, self.count)
        if epoch != self.epoch:
            self.epoch = epoch
            self.order = np.random.default_rng([self.seed, epoch]).permutation(self.count)
        return int(self.order[place])

    def take(self, first: int, count: int) -> torch.Tensor:
        """Rows ``first`` to ``first + count`` of the endless order, ``[count, length]`` int64."""
        places = torch.tensor([self._place(first + k) for k in range(count)], dtype=torch.long)
        if self.rows.is_cuda:
            places = places.pin_memory().to(self.rows.device, non_blocking=True)
        ids = self.rows[places].long() & 0xFFFF  # kept as int16, which CUDA can index
        return torch.nn.functional.pad(ids, (1, 0), value=END)


class Mixture:
    """Batches of which each stream has its part, a pure function of the step.

    Args:
        streams: with the rows that each gives to a batch of one process.
        rank, world: this process among those that share a step.
    """

    def __init__(self, streams: Sequence[tuple[Stream, int]], rank: int = 0, world: int = 1) -> None:
        self.streams, self.rank, self.world = [s for s in streams if s[1]], rank, world

    def __call__(self, step: int) -> torch.Tensor:
        """``[rows, length]`` int64."""
        turn = step * self.world + self.rank
        return torch.cat([stream.take(turn * count, count) for stream, count in self.streams])
