"""Decoding one token at a time as a CUDA graph: hundreds of small kernels, one launch."""

import copy
import threading
import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from spiking_mamba.model.cache import Cache, tensors

__all__ = ["DecodingGraph", "DecodingGraphs"]

# (input_ids [B, 1], cache) -> logits [B, 1, vocab_size]; moves the cache's states on in place.
Step = Callable[[torch.Tensor, Cache], torch.Tensor]


class DecodingGraph:
    """A step captured for one batch size.

    A graph reads and writes fixed addresses, so it has a cache of its own. The caller's cache moves in: its
    states are copied there once, and from then on it refers to the graph's tensors. When another cache moves
    in, the one before gets its states back as copies; so any number of sequences can take turns.

    Args:
        step: what to capture. Off CUDA it is called each time.
        cache: an example, whose sequences have begun; it is not changed.
        copied: makes the graph's own cache of it, perhaps in other dtypes.
    """

    def __init__(self, step: Step, cache: Cache, copied: Callable[[Cache], Cache] = copy.deepcopy) -> None:
        with torch.inference_mode(False), torch.no_grad():  # or they could not be written to outside of it
            self._cache = copied(cache)
            self._tensors = [states[key] for states, key in tensors(self._cache)]
            device = self._tensors[0].device
            self._input_ids = torch.zeros(self._tensors[0].shape[0], 1, dtype=torch.long, device=device)
        self._tenant: weakref.ref[Cache] | None = None
        self._step = step
        self.graph: torch.cuda.CUDAGraph | None = None
        if device.type == "cuda":
            with torch.cuda.device(device):  # whose streams are meant, whatever the current device is
                self._capture(device)

    def _capture(self, device: torch.device) -> None:
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(3):  # compiles, tunes and allocates what must not happen in a capture
                self._step(self._input_ids, self._cache)
        torch.cuda.current_stream().wait_stream(side)
        self.graph = torch.cuda.CUDAGraph()
        usual = torch.cuda.graph.default_capture_stream  # of the device that was captured on first
        own = torch.cuda.Stream() if usual is not None and usual.device != device else None
        with torch.cuda.graph(self.graph, stream=own):
            self._logits = self._step(self._input_ids, self._cache)

    def _move_in(self, cache: Cache) -> None:
        before = None if self._tenant is None else self._tenant()
        if before is not None and before is not cache:
            for (states, key), ours in zip(tensors(before), self._tensors, strict=True):
                if states[key] is ours:
                    states[key] = ours.clone()
        for (states, key), ours in zip(tensors(cache), self._tensors, strict=True):
            if states[key] is not ours:  # beam search may have reordered some
                ours.copy_(states[key])
                states[key] = ours
        self._tenant = weakref.ref(cache)

    def __call__(self, input_ids: torch.Tensor, cache: Cache) -> torch.Tensor:
        """One token, ``[B, 1] -> [B, 1, vocab_size]``, a new tensor; the states of ``cache`` move on."""
        if any(states[key] is not ours for (states, key), ours in zip(tensors(cache), self._tensors)):  # noqa: B905
            self._move_in(cache)
        self._input_ids.copy_(input_ids)
        if self.graph is None:
            return self._step(self._input_ids, self._cache)
        self.graph.replay()
        return self._logits.clone()


class DecodingGraphs:
    """A model's graphs by batch size and autocast dtype, as long as the model stays what was captured.

    Args:
        step: what to capture. blocks: the modules whose hooks and neurons are watched, since a replayed graph
            runs neither hooks nor a neuron that was put in later.
        copied: see :class:`DecodingGraph`.
    """

    def __init__(
        self, step: Step, blocks: nn.Module, copied: Callable[[Cache], Cache] = copy.deepcopy
    ) -> None:
        self.step, self._blocks, self._copied = step, blocks, copied
        self._lock = threading.Lock()  # sequences of several threads take turns in a graph's tensors
        self._graphs: dict[tuple[int, Any], DecodingGraph] = {}
        self._note_modules()

    def __len__(self) -> int:
        return len(self._graphs)

    @property
    def captured(self) -> dict[int, torch.cuda.CUDAGraph]:
        """The graphs of a token by batch size, outside autocast; none off CUDA."""
        with self._lock:
            made = {batch: each.graph for (batch, autocast), each in self._graphs.items() if not autocast}
        return {batch: graph for batch, graph in made.items() if graph is not None}

    def __reduce__(self) -> tuple[Any, ...]:
        # a copied or pickled model captures its own
        return DecodingGraphs, (self.step, self._blocks, self._copied)

    def _note_modules(self) -> None:
        # the dictionaries themselves: looking into them is what a token costs the processor
        self._hooks, self._neurons = [], []
        for module in self._blocks.modules():
            self._hooks += [module._forward_hooks, module._forward_pre_hooks]
            if "neuron" in module._modules:
                self._neurons.append((module._modules, module._modules["neuron"]))

    def __call__(self, input_ids: torch.Tensor, cache: Cache) -> torch.Tensor | None:
        """One more token's logits ``[B, 1, vocab_size]``, or None: somebody watches, run it uncaptured."""
        if any(modules["neuron"] is not neuron for modules, neuron in self._neurons):
            self._graphs.clear()
            self._note_modules()
        if any(self._hooks):
            return None
        device = input_ids.device.type
        autocast = torch.is_autocast_enabled(device) and torch.get_autocast_dtype(device)
        key = (input_ids.shape[0], autocast)
        with self._lock:
            if key not in self._graphs:
                self._graphs[key] = DecodingGraph(self.step, cache, self._copied)
            return self._graphs[key](input_ids, cache)
