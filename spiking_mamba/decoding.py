"""Decoding one token at a time as a CUDA graph: hundreds of small kernels, one launch."""

import copy
import weakref
from collections.abc import Callable, Iterator

import torch
from transformers import Cache

__all__ = ["DecodingGraph", "Step"]

# (input_ids [B, 1], cache) -> hidden states [B, 1, hidden_size]; moves the cache's states on in place.
Step = Callable[[torch.Tensor, Cache], torch.Tensor]


def _states(cache: Cache) -> Iterator[tuple[dict[int, torch.Tensor | None], int]]:
    """Where a cache keeps its tensors: every dictionary and key."""
    for layer in cache.layers:
        for states in (layer.conv_states, layer.recurrent_states):
            for key, state in states.items():
                if state is not None:
                    yield states, key


class DecodingGraph:
    """A step captured for one batch size.

    A graph reads and writes fixed addresses, so it has a cache of its own. The caller's cache moves in: its
    states are copied there once, and from then on it refers to the graph's tensors. When another cache moves
    in, the one before gets its states back as copies; so any number of sequences can take turns.

    Args:
        step: what to capture. Off CUDA it is called each time.
        cache: an example, whose sequences have begun; it is not changed.
    """

    def __init__(self, step: Step, cache: Cache) -> None:
        self._cache = copy.deepcopy(cache)
        self._tenant: weakref.ref[Cache] | None = None
        state = cache.get_conv_state(0)
        self._input_ids = torch.zeros(state.shape[0], 1, dtype=torch.long, device=state.device)
        self._step = step
        self._graph: torch.cuda.CUDAGraph | None = None
        if state.is_cuda:
            self._capture()

    def _capture(self) -> None:
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(3):  # compiles, tunes and allocates what must not happen in a capture
                self._step(self._input_ids, self._cache)
        torch.cuda.current_stream().wait_stream(side)
        self._graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self._graph):
            self._hidden = self._step(self._input_ids, self._cache)

    def _lives_here(self, cache: Cache) -> bool:
        pairs = zip(_states(cache), _states(self._cache), strict=True)
        return all(theirs[i] is ours[j] for (theirs, i), (ours, j) in pairs)

    def _move_in(self, cache: Cache) -> None:
        before = None if self._tenant is None else self._tenant()
        if before is not None and before is not cache:
            for (theirs, i), (ours, j) in zip(_states(before), _states(self._cache), strict=True):
                if theirs[i] is ours[j]:
                    theirs[i] = ours[j].clone()
        for (theirs, i), (ours, j) in zip(_states(cache), _states(self._cache), strict=True):
            if theirs[i] is not ours[j]:  # beam search may have reordered some
                ours[j].copy_(theirs[i])
                theirs[i] = ours[j]
        self._tenant = weakref.ref(cache)

    def __call__(self, input_ids: torch.Tensor, cache: Cache) -> torch.Tensor:
        """One token, ``[B, 1] -> [B, 1, hidden_size]``, a new tensor; the states of ``cache`` move on."""
        if not self._lives_here(cache):
            self._move_in(cache)
        self._input_ids.copy_(input_ids)
        if self._graph is None:
            return self._step(self._input_ids, self._cache)
        self._graph.replay()
        return self._hidden.clone()
