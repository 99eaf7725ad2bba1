"""A Llama that writes: one token of many rows at a time, its keys and values in tensors that stay put.

On CUDA a step is a graph; there is one for every so many positions of the cache that attention reads.
"""

import math
from collections.abc import Callable
from typing import Any

import torch
from llama import Layer, Llama, Shape, feed_forward, rms_norm, rotate, split_heads
from torch.nn import functional as F

__all__ = ["Openings", "Writer"]


def _before(
    x: torch.Tensor, layer: Layer, shape: Shape, cos: torch.Tensor, sin: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Query, scaled, ``[B, H, P]``, key and value ``[B, K, P]`` of a token ``[B, C]``."""
    h = rms_norm(x, layer.attention_norm, shape.eps)
    query, key, value = split_heads(F.linear(h, layer.qkv, layer.qkv_bias), shape)
    return rotate(query, cos, sin) * shape.head_dim**-0.5, rotate(key, cos, sin), value


def _behind(x: torch.Tensor, mixed: torch.Tensor, layer: Layer, eps: float) -> torch.Tensor:
    """The residual stream ``[B, C]`` behind a layer of which attention's heads say ``mixed`` ``[B, H P]``."""
    x = x + F.linear(mixed, layer.out, layer.out_bias)
    return x + feed_forward(x, layer, eps)


def draw(logits: torch.Tensor, noise: torch.Tensor, temperature: float, min_p: float) -> torch.Tensor:
    """A token ``[B]`` from logits ``[B, V]``, drawn by min-p sampling (Nguyen et al., arXiv 2407.01082).

    Of those at least ``min_p`` times as probable as the most probable, the one of least ``noise``
    (exponential) by probability.
    """
    scores = logits.float() / temperature
    likely = scores >= scores.amax(-1, keepdim=True) + math.log(min_p)
    return torch.where(likely, scores - noise.log(), -math.inf).argmax(-1)


class Openings:
    """Openings of documents as a table, and for every row of a batch the order it takes them in.

    Args:
        tokens: ``[n, longest]`` int64, padded. lengths: ``[n]`` int64.
        orders: ``[B, m]`` int64, numbers of openings.
    """

    def __init__(self, tokens: torch.Tensor, lengths: torch.Tensor, orders: torch.Tensor) -> None:
        self.tokens, self.lengths, self.orders = tokens, lengths, orders


class Writer:
    """Writes documents into rows, one behind another.

    A row begins with the end-of-text token and an opening; where the model ends a document (with that token,
    or with the one that ends its turn in a chat, behind which the other is put), the row's next opening
    follows.

    Args:
        source: the model, on its device.
        rows, length: of what is written at a time.
        openings: a table of ``tokens`` and ``lengths``; its ``orders`` are redrawn for every batch.
        end: the end-of-text token. ends_turn: the token that ends a turn.
        temperature, min_p: see :func:`draw`.
        every: positions that one graph reads more than the one before.
        compiles: use ``torch.compile``.
    """

    def __init__(
        self,
        source: Llama,
        rows: int,
        length: int,
        openings: Openings,
        end: int,
        ends_turn: int,
        temperature: float = 0.9,
        min_p: float = 0.04,
        every: int = 64,
        compiles: bool = True,
    ) -> None:
        self.source, self.rows, self.length, self.openings = source, rows, length, openings
        self.end, self.ends_turn, self.temperature, self.min_p = end, ends_turn, temperature, min_p
        self.every = every
        shape, device, dtype = source.shape, source.embedding.device, source.embedding.dtype
        self.before: Callable[..., Any] = torch.compile(_before, dynamic=False) if compiles else _before
        self.behind: Callable[..., Any] = torch.compile(_behind, dynamic=False) if compiles else _behind
        self.draw: Callable[..., Any] = torch.compile(draw, dynamic=False) if compiles else draw
        kept = (len(source.layers), rows * shape.kv_heads, length, shape.head_dim)
        self.keys, self.values = (torch.zeros(kept, dtype=dtype, device=device) for _ in range(2))
        self.noise = torch.empty(rows, shape.vocab_size, dtype=torch.float32, device=device)
        self.positions = torch.arange(length, device=device)
        self.position = torch.zeros(1, dtype=torch.long, device=device)
        self.ids = torch.zeros(rows, dtype=torch.long, device=device)
        self.opening, self.place = torch.zeros_like(self.ids), torch.zeros_like(self.ids)
        self.written = torch.zeros(rows, length, dtype=torch.long, device=device)
        self.starts = torch.zeros(rows, length, dtype=torch.bool, device=device)
        self.graphs: dict[int, torch.cuda.CUDAGraph] = {}

    def _logits(self, reach: int) -> torch.Tensor:
        """``[B, V]`` behind ``ids``, which stand at ``position``; attention reads ``reach`` positions."""
        source, shape = self.source, self.source.shape
        cos, sin = source.angles(self.position)
        hidden_ones = torch.where(self.positions[:reach] <= self.position, 0.0, -math.inf)
        mask = hidden_ones.to(self.keys.dtype)
        x = F.embedding(self.ids, source.embedding).float()
        for number, layer in enumerate(source.layers):
            query, key, value = self.before(x, layer, shape, cos, sin)
            keys, values = self.keys[number], self.values[number]
            keys.index_copy_(1, self.position, key.reshape(-1, 1, shape.head_dim))
            values.index_copy_(1, self.position, value.reshape(-1, 1, shape.head_dim))
            query = query.reshape(len(keys), -1, shape.head_dim)  # the heads that share a key
            weights = torch.bmm(query, keys[:, :reach].transpose(1, 2)).add_(mask).softmax(-1)
            mixed = torch.bmm(weights, values[:, :reach])
            x = self.behind(x, mixed.view(self.rows, -1), layer, shape.eps)
        return F.linear(rms_norm(x, source.norm, shape.eps), source.head)

    def _step(self, reach: int) -> None:
        """Write the token behind ``ids`` and make it the next ``ids``."""
        sampled = self.draw(self._logits(reach), self.noise.exponential_(), self.temperature, self.min_p)
        table = self.openings
        number = torch.gather(table.orders, 1, self.opening[:, None])[:, 0]
        given = self.place < table.lengths[number]
        place = self.place.clamp(max=table.tokens.shape[1] - 1)
        wanted = torch.where(given, table.tokens[number, place], sampled)
        # a token that ends the turn is followed by one that ends the text; that one by the next opening
        turn_over = self.ids == self.ends_turn
        turn_over &= ~given & (self.place > table.lengths[number])
        wanted = torch.where(turn_over, self.end, wanted)
        over = (wanted == self.end) & ~given
        self.place.add_(1).masked_fill_(over, 0)
        self.opening.add_(over.long()).clamp_(max=table.orders.shape[1] - 1)
        self.position.add_(1)
        self.ids.copy_(wanted)
        self.written.index_copy_(1, self.position, wanted[:, None])
        self.starts.index_copy_(1, self.position, over[:, None])

    def _begin(self) -> None:
        for tensor in (self.position, self.opening, self.place):
            tensor.zero_()
        self.ids.fill_(self.end)
        self.written.fill_(self.end)
        self.starts.zero_()
        self.starts[:, 0] = True

    def _reach(self, position: int) -> int:
        return min(self.length, (position // self.every + 1) * self.every)

    @torch.no_grad()
    def capture(self) -> None:
        """Make the graphs, on CUDA."""
        reaches = sorted({self._reach(position) for position in range(self.length - 1)})
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for reach in (reaches[0], *reaches):  # compiles, tunes, allocates
                self._begin()
                self._step(reach)
        torch.cuda.current_stream().wait_stream(side)
        torch.cuda.synchronize()
        pool = None
        for reach in reversed(reaches):  # the largest first: the others fit into its memory
            self._begin()
            self.graphs[reach] = torch.cuda.CUDAGraph()
            with torch.cuda.graph(self.graphs[reach], pool=pool, stream=side):
                self._step(reach)
            pool = self.graphs[reach].pool()

    @torch.no_grad()
    def write(self, orders: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """A batch of rows.

        Args:
            orders: ``[B, m]``, see :class:`Openings`.

        Returns:
            Tokens ``[B, length]`` int64, and where a document starts, ``[B, length]`` bool; each starts with
            the end-of-text token. Both are overwritten by the next call.
        """
        self.openings.orders.copy_(orders)
        self._begin()
        for position in range(self.length - 1):
            reach = self._reach(position)
            if self.graphs:
                self.graphs[reach].replay()
            else:
                self._step(reach)
        return self.written, self.starts
