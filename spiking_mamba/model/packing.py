"""Where the tokens of a batch are: padding on any side or inside, and documents packed in one row.

Padding moves to the end of every row before the first block and back behind the last one, so that no block
has to step over it. Where a document begins, convolution, scan and neurons start afresh.
"""

from typing import Any, NamedTuple

import torch

__all__ = [
    "Packing",
    "Pieces",
    "documents_of",
    "moved",
    "pack",
    "packing_of",
    "real_tokens",
    "reject_unknown_arguments",
]

# What collators of packed rows give beside that, for attention: it says nothing new.
IGNORED = ("cu_seq_lens_k", "max_length_q", "max_length_k")


class Pieces(NamedTuple):
    """The documents of a batch as sequences of their own, the longest first.

    Attributes:
        row, start, length: int64 ``[pieces]``: where each stands.
        goes_on: bool ``[pieces]``: whether it goes on from the states of its row.
        last: int64 ``[B]``: the piece in which a row ends; -1 for a row without a token.
        lengths: the different lengths, ascending, and how many pieces are at least so long.
    """

    row: torch.Tensor
    start: torch.Tensor
    length: torch.Tensor
    goes_on: torch.Tensor
    last: torch.Tensor
    lengths: list[tuple[int, int]]


class Packing(NamedTuple):
    """What the blocks have to know of a batch whose tokens stand before its padding.

    Attributes:
        real: bool ``[B, L]``, true for tokens; None: all are, or nobody asks for states behind the last.
        document: int32 ``[B, L]``, the number of a token's document in its row, ascending; 0 goes on from
            what the row's cache holds, any other starts afresh. None: all are 0.
        pieces: the same for neurons with a state; None where there are none.
    """

    real: torch.Tensor | None = None
    document: torch.Tensor | None = None
    pieces: Pieces | None = None

    def lengths(self, x: torch.Tensor) -> torch.Tensor:
        """Tokens of each row of ``x`` ``[B, L, ...]``, int64 ``[B]``."""
        if self.real is not None:
            return self.real.sum(1)
        return torch.full(x.shape[:1], x.shape[1], device=x.device)


def reject_unknown_arguments(given: dict[str, Any]) -> None:
    """Raise a TypeError for an argument of a forward pass that would otherwise vanish without a word."""
    for name, value in given.items():
        if value is not None and value is not False and name not in IGNORED:
            raise TypeError(f"forward() got an unexpected keyword argument {name!r}")


def real_tokens(attention_mask: torch.Tensor | None, shape: tuple[int, int]) -> torch.Tensor | None:
    """The mask of a batch's own tokens, bool ``[B, L]``, out of one that covers a cache's past too.

    None where all are tokens.

    Raises:
        ValueError: it is shorter than the batch.
    """
    if attention_mask is None:
        return None
    if attention_mask.ndim != 2 or attention_mask.shape[0] != shape[0] or attention_mask.shape[1] < shape[1]:
        raise ValueError(
            f"attention_mask must be {list(shape)}, or longer by what the cache has seen, "
            f"got {list(attention_mask.shape)}."
        )
    real = attention_mask[:, attention_mask.shape[1] - shape[1] :].bool()
    return None if not torch.compiler.is_compiling() and bool(real.all()) else real


def moved(x: torch.Tensor, order: torch.Tensor | None) -> torch.Tensor:
    """``x`` ``[B, L, ...]`` with the tokens in another order, int64 ``[B, L]``."""
    return x if order is None else x.gather(1, order.view(*order.shape, *[1] * (x.ndim - 2)).expand_as(x))


def documents_of(
    shape: tuple[int, int],
    seq_idx: torch.Tensor | None = None,
    position_ids: torch.Tensor | None = None,
    cu_seq_lens: torch.Tensor | None = None,
    real: torch.Tensor | None = None,
) -> torch.Tensor | None:
    """``Packing.document`` of a batch ``(B, L)``, in its own order, from one or more of what says it.

    Args:
        shape: ``(B, L)``.
        seq_idx: ``[B, L]``, another number for another document.
        position_ids: ``[B, L]``, 0 where a document begins, counting up within it.
        cu_seq_lens: ``[documents + 1]``, where the documents of a single row begin, then its length.
        real: bool ``[B, L]``; at padding nothing begins.

    Raises:
        ValueError: a shape is wrong, or positions do not count up (both looked at on the CPU).
    """
    starts = None
    if position_ids is not None:
        positions = position_ids.expand(shape)
        starts = positions == 0
        if positions.device.type == "cpu" and not torch.compiler.is_compiling():
            jumps = (positions[:, 1:] != positions[:, :-1] + 1) & ~starts[:, 1:]
            if real is not None:
                jumps &= real[:, 1:] & real[:, :-1]
            if bool(jumps.any()):
                raise ValueError("position_ids must count up by one within a document, from 0 at its start.")
    if cu_seq_lens is not None:
        if shape[0] != 1 or cu_seq_lens.ndim != 1:
            raise ValueError(f"cu_seq_lens_q belongs to a single row, and there are {shape[0]}.")
        starts = torch.zeros(1, shape[1] + 1, dtype=torch.bool, device=cu_seq_lens.device)
        starts[0, cu_seq_lens.long()] = True
        starts = starts[:, :-1]
    if seq_idx is not None:
        if tuple(seq_idx.shape) != tuple(shape):
            raise ValueError(
                f"seq_idx must have the shape {list(shape)} of the tokens, got {list(seq_idx.shape)}."
            )
        starts = torch.zeros(shape, dtype=torch.bool, device=seq_idx.device)
        starts[:, 1:] = seq_idx[:, 1:] != seq_idx[:, :-1]
    if starts is None:
        return None
    if real is not None:
        starts = starts & real
    return starts.cumsum(1, dtype=torch.int32)


def pack(
    shape: tuple[int, int],
    real: torch.Tensor | None,
    document: torch.Tensor | None,
    keeps_states: bool,
    with_pieces: bool,
) -> tuple[torch.Tensor | None, Packing | None]:
    """How to move a batch's padding to the end of its rows, and what its blocks have to know then.

    Args:
        shape: ``(B, L)``.
        real, document: as in :class:`Packing`, in the batch's own order.
        keeps_states: whether states behind the last token are asked for.
        with_pieces: whether there are neurons with states.

    Returns:
        int64 ``[B, L]``, for each place which token comes there, None where all stay; and the packing, None
        where there is nothing to know.
    """
    order = None
    if real is not None and bool((real[:, 1:] & ~real[:, :-1]).any()):
        order = torch.argsort(~real, dim=1, stable=True)
        real = real.gather(1, order)
        if document is not None:  # what has moved to the end belongs to the last document there
            document = document.gather(1, order).cummax(1).values
    if not keeps_states:
        real = None  # padding is at the end: no token sees it
    if real is None and document is None:
        return order, None
    return order, Packing(real, document, _pieces(shape, real, document) if with_pieces else None)


def packing_of(
    shape: tuple[int, int],
    attention_mask: torch.Tensor | None,
    seq_idx: torch.Tensor | None,
    position_ids: torch.Tensor | None,
    cu_seq_lens: torch.Tensor | None,
    keeps_states: bool,
    with_pieces: bool,
) -> tuple[torch.Tensor | None, Packing | None]:
    """:func:`pack` of a batch ``(B, L)`` that a forward pass's arguments describe.

    See :func:`real_tokens` and :func:`documents_of`.
    """
    real = real_tokens(attention_mask, shape)
    document = documents_of(shape, seq_idx, position_ids, cu_seq_lens, real)
    return pack(shape, real, document, keeps_states, with_pieces)


def _pieces(shape: tuple[int, int], real: torch.Tensor | None, document: torch.Tensor | None) -> Pieces:
    given = real if real is not None else document
    assert given is not None
    device = given.device
    batch = shape[0]
    tokens = torch.ones(shape, dtype=torch.bool) if real is None else real.cpu()
    number = torch.zeros(shape, dtype=torch.int32) if document is None else document.cpu()
    begins = tokens.clone()
    begins[:, 1:] &= number[:, 1:] != number[:, :-1]
    row, start = begins.nonzero(as_tuple=True)
    ends = torch.cat([start[1:], start.new_zeros(1)])
    in_row = torch.cat([row[1:] == row[:-1], torch.zeros(1, dtype=torch.bool)])[: len(row)]
    ends = torch.where(in_row, ends[: len(row)], tokens.sum(1)[row])
    size = ends - start
    order = torch.argsort(size, descending=True, stable=True)
    last = torch.full((batch,), -1)
    last[row[~in_row]] = torch.argsort(order)[~in_row]  # where those went in which rows end
    row, start, size = row[order], start[order], size[order]
    lengths = [(int(each), int((size >= each).sum())) for each in size.unique(sorted=True)]
    goes_on = number[row, start] == 0
    row, start, size, goes_on, last = (each.to(device) for each in (row, start, size, goes_on, last))
    return Pieces(row, start, size, goes_on, last, lengths)
