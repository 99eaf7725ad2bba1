"""Driving a spikingjelly node with explicit states: they come from the caller and go back to it."""

import copy
import functools
import json
from typing import Any

import torch
from spikingjelly.activation_based.base import MemoryModule

import neurons
from spiking_mamba.model.packing import Pieces

__all__ = ["drive", "drive_pieces", "fresh_states", "probe"]


def fresh_states(node: MemoryModule) -> list:
    """A node's states before its first step, as it was made: numbers, or tensors of one step's shape."""
    return [copy.deepcopy(value) for value in node._memories_rv.values()]


def drive(node: MemoryModule, x_seq: torch.Tensor, states: list) -> torch.Tensor:
    """Spikes ``[T, N, *]`` of ``T`` steps.

    The node itself stays as it is: what is called is a copy that shares parameters and hooks, so that threads
    may share it, and monitors see the call.

    Args:
        node: in any step mode.
        x_seq: ``[T, N, *]``.
        states: after the step before, each ``[N, *]``; empty for a fresh sequence. Replaced by those after
            the last step.
    """
    given = list(states) or fresh_states(node)
    if torch.compiler.is_compiling():  # which sees no copies, and nobody watches
        made = node.materialize_states((x_seq,), tuple(given), "m")
        (spike_seq,), after = node.multi_step_functional_forward((x_seq,), made)
        states[:] = after
        return spike_seq
    private = object.__new__(type(node))
    private.__dict__.update(node.__dict__)
    private.__dict__["_memories"] = dict(node._memories)
    for name, state in zip(node._memories, given, strict=True):
        setattr(private, name, state)
    private.step_mode = "m"
    spike_seq = private(x_seq)
    states[:] = private._memories.values()
    if getattr(node, "store_v_seq", False):
        node.v_seq = private.v_seq
    return spike_seq


def drive_pieces(node: MemoryModule, u: torch.Tensor, states: list, pieces: Pieces) -> torch.Tensor:
    """Spikes ``[B, L, C]`` of rows that hold several documents or end in padding, each a sequence of its own.

    All pieces run side by side, the shorter ones leaving at their ends.

    Args:
        node: as in :func:`drive`.
        u: ``[B, L, C]``.
        states: each ``[B, C]``, or empty, as in :func:`drive`; those of a row without a token stay.
        pieces: where the documents are.
    """
    spikes = torch.zeros_like(u)
    fresh, batch = fresh_states(node), u.shape[0]
    now = [_at_start(value, u, pieces, before) for value, before in zip(fresh, states or fresh, strict=True)]
    ended: list[list[torch.Tensor]] = [[] for _ in now]  # the shortest pieces first
    done = 0
    for length, count in pieces.lengths:
        here = pieces.start[:count, None] + torch.arange(done, length, device=u.device)
        where = pieces.row[:count, None], here  # [pieces, steps]
        now = [state[:count] for state in now]
        out = drive(node, u[where].transpose(0, 1), now).transpose(0, 1)
        spikes = spikes.to(out.dtype).index_put(where, out)
        longer = int((pieces.length > length).sum())
        for kept, state in zip(ended, now, strict=True):
            kept.append(state[longer:])
        now, done = [state[:longer] for state in now], length
    after = [torch.cat(kept[::-1]) for kept in ended]  # in the order of the pieces
    rows = pieces.last.clamp(min=0)
    some = (pieces.last >= 0)[:, None]
    before = states or [torch.zeros(batch, u.shape[2], device=u.device, dtype=state.dtype) for state in after]
    states[:] = [
        torch.where(some, state[rows], old) if len(state) else old
        for state, old in zip(after, before, strict=True)
    ]
    return spikes


def _at_start(
    fresh: float | torch.Tensor, u: torch.Tensor, pieces: Pieces, before: float | torch.Tensor
) -> torch.Tensor:
    """A state at the start of each piece, ``[pieces, C]``: that of its row, or a fresh one."""
    size = (len(pieces.row), u.shape[2])
    dtype = before.dtype if isinstance(before, torch.Tensor) else torch.promote_types(u.dtype, torch.float32)
    new = torch.as_tensor(fresh, dtype=dtype, device=u.device).expand(size)
    if not isinstance(before, torch.Tensor):
        return new.clone()
    return torch.where(pieces.goes_on[:, None], before[pieces.row], new)


@functools.lru_cache(maxsize=64)
def probe(spec: str, membrane: str) -> None:
    """Try what a model relies on in a neuron, whatever its class.

    Args:
        spec: of the neuron, as JSON, see ``neurons.build``.
        membrane: 'sequence': a sequence at once gives what its pieces give; 'token': every channel of every
            token gives one value.

    Raises:
        ValueError: it does not; the neuron is named.
    """
    with torch.device("cpu"):  # whatever the caller's default device is
        node: Any = neurons.build(json.loads(spec))
        name = type(node).__name__
        if hasattr(node, "backend"):
            node.backend = "torch"  # the others may need a machine that is not here
        x = 3.0 * torch.randn(6, 2, 5, generator=torch.Generator().manual_seed(0))
        lengths = (6,) if membrane == "token" else (1, 2, 3)
        try:
            with torch.no_grad():
                whole = drive(node, x, [])
                states: list = []
                pieces = torch.cat([drive(node, piece, states) for piece in x.split(lengths)])
        except Exception as error:  # of somebody else's code
            raise ValueError(
                f"{name} cannot be driven over [T, B, C]: {type(error).__name__}: {error}"
            ) from error
    if whole.shape != x.shape:
        raise ValueError(f"{name} gives {list(whole.shape)} for {list(x.shape)}: one value each is wanted.")
    if not torch.allclose(whole, pieces, atol=1e-5, equal_nan=True):
        raise ValueError(
            f"{name} gives other spikes for a sequence at once than for its pieces: with membrane='sequence' "
            "it could not decode what it was trained on."
        )
