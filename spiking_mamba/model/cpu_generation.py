"""``generate()`` of an event-driven model on a processor: the prompt at once, then compiled."""

import contextlib
import threading
from collections.abc import Callable, Iterator
from typing import Any, cast

import numpy as np
import torch
from transformers import GenerationConfig, LogitsProcessorList

from neurons.changes import Seen
from spiking_mamba.common.machine import cores
from spiking_mamba.model.cpu_decoder import CpuDecoder, Fetched, cannot_decode
from spiking_mamba.model.graph_generation import cannot_loop, choose, settings, sorted_criteria
from spiking_mamba.model.modeling import SpikingMambaForCausalLM

__all__ = ["Decoders", "cannot_generate", "decode"]

_MEASURED = 32  # tokens over which a model's share of spikes is measured
_AT_FIRST = 1024  # tokens that there is room for before the text has to move


def cannot_generate(model: SpikingMambaForCausalLM, args: tuple, kwargs: dict[str, Any]) -> str | None:
    """Why a call of ``generate()`` with these arguments cannot go through a decoder; None where it can."""
    ids = args[0] if args else kwargs.get("inputs", kwargs.get("input_ids"))
    if (reason := cannot_loop(model, args, kwargs)) is not None:
        return reason
    each = settings(model, kwargs).num_return_sequences or 1
    if (1 if ids is None else ids.shape[0]) * each != 1:
        return "Only one sequence at a time is decoded."
    return cannot_decode(model)


class Decoders:
    """A model's decoders, one for each caller at a time, all of the same weights in memory.

    Made where they are needed first, and anew when a weight has changed.

    Args:
        threads: for one token; None: torch's number of threads, at most that of the cores.
    """

    def __init__(self, threads: int | None = None) -> None:
        self.threads = threads
        self._lock = threading.Lock()
        self._free: list[CpuDecoder] = []
        self._of: tuple[Seen, int] | None = None

    def __reduce__(self) -> tuple[Any, ...]:
        return Decoders, (self.threads,)  # a copied or pickled model makes its own

    @contextlib.contextmanager
    def borrow(self, model: SpikingMambaForCausalLM, prompt: list[int]) -> Iterator[CpuDecoder]:
        """A decoder that nobody else has; the first one measures on the prompt which layout is faster."""
        tensors = [*model.parameters(), *model.buffers()]
        threads = self.threads or min(torch.get_num_threads(), cores())
        with self._lock:
            if self._of is None or self._of[1] != threads or not self._of[0].unchanged(tensors):
                self._free, self._of = [_measured(model, threads, prompt)], (Seen(tensors), threads)
            of = self._of
            # the last one stays, to make others of
            decoder = self._free.pop() if len(self._free) > 1 else self._free[0].another()
        try:
            yield decoder
        finally:
            with self._lock:
                if self._of is of:
                    self._free.append(decoder)

    def fetched(self) -> Fetched | None:
        """What a token has read, a mean over all tokens decoded so far; None before the first."""
        with self._lock:
            used = self._free[1:]
            tokens = sum(decoder.tokens for decoder in used)
            if not tokens:
                return None
            return used[0].fetched(np.sum([decoder.fired for decoder in used], axis=0) / tokens)

    def firing(self) -> list[float]:
        """Shares of inputs that fired, see :meth:`CpuDecoder.firing`, a mean over all tokens decoded."""
        with self._lock:
            used = self._free[1:]
            tokens = sum(decoder.tokens for decoder in used)
            return [
                sum(d.tokens * share[i] for d, share in ((d, d.firing()) for d in used)) / max(1, tokens)
                for i in range(4)
            ]


def _measured(model: SpikingMambaForCausalLM, threads: int, prompt: list[int]) -> CpuDecoder:
    decoder = CpuDecoder(model, threads)
    if model.config.neuron is None:
        return decoder
    for token in prompt[:_MEASURED]:
        decoder.step(token)
    shares = decoder.firing()
    return decoder if decoder.suits(shares) else CpuDecoder(model, threads, shares)


class _Text:
    """The tokens so far, ``[1, n]``, in memory that grows seldom."""

    def __init__(self, ids: torch.Tensor, longest: int | None) -> None:
        self.length = ids.shape[1]
        room = _AT_FIRST if longest is None else min(_AT_FIRST, longest - self.length)
        self._ids = ids.new_empty(1, self.length + max(1, room), dtype=torch.long)
        self._ids[:, : self.length] = ids

    def append(self, token: int) -> None:
        if self.length == self._ids.shape[1]:
            self._ids = torch.cat([self._ids, torch.empty_like(self._ids)], 1)
        self._ids[0, self.length] = token
        self.length += 1

    @property
    def ids(self) -> torch.LongTensor:
        return cast(torch.LongTensor, self._ids[:, : self.length])


def _chooser(text: _Text, processors: LogitsProcessorList, samples: bool) -> Callable[[np.ndarray], int]:
    """What makes a token of logits ``[vocab_size]``, as ``generate()`` of transformers does."""
    if not processors and not samples:
        return lambda logits: int(logits.argmax())

    return lambda logits: int(choose(torch.from_numpy(logits.copy())[None], text.ids, processors, samples))


def _ends(text: _Text, criteria: Any) -> Callable[[int], bool]:
    """Whether the text ends with a token; the usual two criteria without a tensor."""
    longest, last, others = sorted_criteria(criteria)

    def ends(token: int) -> bool:
        if token in last or (longest is not None and text.length >= longest):
            return True
        return any(bool(torch.as_tensor(c(text.ids, None)).all()) for c in others)

    return ends


def decode(
    decoders: Decoders,
    model: SpikingMambaForCausalLM,
    input_ids: torch.Tensor,
    logits_processor: LogitsProcessorList,
    stopping_criteria: Any,
    generation_config: GenerationConfig,
    synced_gpus: bool = False,
    streamer: Any = None,
    **model_kwargs: Any,
) -> torch.Tensor:
    """The loop of ``generate()`` for one sequence, greedy or sampling.

    What transformers calls ``custom_generate``, with its arguments.

    Returns:
        The tokens, ``[1, n]``, the prompt first.
    """
    inputs = model.prepare_inputs_for_generation(input_ids, is_first_iteration=True, **model_kwargs)
    output = model(**inputs, return_dict=True)
    cache = output.cache
    text = _Text(input_ids, getattr(stopping_criteria, "max_length", None))
    chosen = _chooser(text, logits_processor, bool(generation_config.do_sample))
    ends = _ends(text, stopping_criteria)
    with decoders.borrow(model, input_ids[0].tolist()) as decoder:
        decoder.load(cache)
        logits = output.logits[0, -1].float().numpy()
        while True:
            token = chosen(logits)
            text.append(token)
            if streamer is not None:
                streamer.put(torch.tensor([token]))
            if ends(token):
                break
            logits = decoder.step(token)
        decoder.save(cache)  # perhaps the caller's
    if streamer is not None:
        streamer.end()
    return text.ids.clone()  # without the room behind it
