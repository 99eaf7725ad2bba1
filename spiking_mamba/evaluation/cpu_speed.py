"""How fast models decode on a processor, token by token, batch 1: ways in turn, in one process."""

import contextlib
import os
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers.generation.streamers import BaseStreamer

from neurons.cpu.memory import aligned
from spiking_mamba.common.progress import Share
from spiking_mamba.model.event_driven import EventDrivenMambaForCausalLM
from spiking_mamba.model.gguf import write_gguf
from spiking_mamba.model.modeling import SpikingMambaForCausalLM
from spiking_mamba.spikes.joules import ProcessorJoules

__all__ = [
    "LLAMA",
    "PROMPT",
    "Way",
    "captured_way",
    "event_way",
    "llama_ways",
    "measure",
    "read_bandwidth",
    "timed",
]

LLAMA = {"F16": 1, "Q8_0": 7, "Q4_0": 2}  # llama.cpp's numbers for its formats
PROMPT = 256  # tokens
_silent: list[object] = []  # llama.cpp calls it as long as it runs


@dataclass
class Way:
    """A way to decode.

    Attributes:
        decode: seconds that so many tokens take.
        prompt: seconds of a prompt of :data:`PROMPT` tokens.
        fetched: share of projections' weights that a token reads, and its bytes, after decoding.
        times: seconds a token, of every repeat.
        joules: of all repeats, where the processor counts them.
    """

    decode: Callable[[int], float]
    prompt: Callable[[], float]
    fetched: Callable[[], tuple[float, float]] | None = None
    times: list[float] = field(default_factory=list)
    joules: float = 0.0


def timed(function: Callable[[], object]) -> float:
    """Seconds of a call."""
    start = time.perf_counter()
    function()
    return time.perf_counter() - start


class _Clock(BaseStreamer):
    """When tokens came."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def put(self, value: torch.Tensor) -> None:
        self.times.append(time.perf_counter())

    def end(self) -> None:
        pass


@torch.no_grad()
def _prompt_seconds(model: SpikingMambaForCausalLM) -> float:
    ids = torch.arange(PROMPT)[None] % model.config.vocab_size
    return timed(lambda: model(ids, use_cache=True, logits_to_keep=1))


def event_way(made: EventDrivenMambaForCausalLM, threads: int, prompt: torch.Tensor | None = None) -> Way:
    """Integers by compiled code: ``generate()``, greedily, from its first token to its last.

    Args:
        made: it no longer ends at its end-of-text token.
        threads: for one token.
        prompt: ids, [1, n]; None: 32 drawn ones.

    Raises:
        RuntimeError: numba is missing.
    """
    made.set_decoding("compiled", threads)
    made.generation_config.eos_token_id = None
    drawn = torch.randint(made.config.vocab_size, (1, 32), generator=torch.Generator().manual_seed(0))
    ids = drawn if prompt is None else prompt

    def decode(count: int) -> float:
        clock = _Clock()
        made.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=count + 1,
            do_sample=False,
            streamer=clock,
        )
        return clock.times[-1] - clock.times[1]  # the prompt comes first, then what its forward pass gives

    def fetched() -> tuple[float, float]:
        found = made.decoders.fetched()
        return found.share, found.total

    return Way(decode, lambda: _prompt_seconds(made), fetched)


def captured_way(model: SpikingMambaForCausalLM) -> Way:
    """A model in its own dtype by torch, captured, without what ``generate()`` adds."""
    model.capture_decoding()
    state: list = []

    @torch.no_grad()
    def run(count: int) -> None:
        if not state:
            state.append(model(torch.zeros(1, 8, dtype=torch.long), use_cache=True).cache)
        for token in range(count):
            model(torch.full((1, 1), token % model.config.vocab_size), cache=state[0], use_cache=True)

    return Way(lambda count: timed(lambda: run(count)), lambda: _prompt_seconds(model))


def _llama_way(path: Path, threads: int) -> Way:
    import llama_cpp as lc

    model_settings, settings = lc.llama_model_default_params(), lc.llama_context_default_params()
    model_settings.n_gpu_layers = 0
    settings.n_ctx, settings.n_threads, settings.n_threads_batch = 4096, threads, threads
    model = lc.llama_model_load_from_file(str(path).encode(), model_settings)
    context = lc.llama_init_from_model(model, settings)
    token, tokens = (lc.llama_token * 1)(1), (lc.llama_token * PROMPT)(*(i % 32 for i in range(PROMPT)))

    def run(count: int) -> None:
        lc.llama_memory_clear(lc.llama_get_memory(context), True)
        for step in range(count):
            token[0] = step + 1
            if lc.llama_decode(context, lc.llama_batch_get_one(token, 1)):
                raise RuntimeError("llama.cpp did not decode a token.")
        lc.llama_get_logits_ith(context, -1)

    def prompt() -> None:
        lc.llama_memory_clear(lc.llama_get_memory(context), True)
        if lc.llama_decode(context, lc.llama_batch_get_one(tokens, PROMPT)):
            raise RuntimeError("llama.cpp did not take the prompt.")
        lc.llama_get_logits_ith(context, -1)

    return Way(lambda count: timed(lambda: run(count)), lambda: timed(prompt))


def llama_ways(
    dense: SpikingMambaForCausalLM, folder: Path, threads: int, forms: Mapping[str, int] = LLAMA
) -> dict[str, Way]:
    """A dense model by llama.cpp, in each of its formats; needs the packages gguf and llama-cpp-python.

    Args:
        dense: what is written as GGUF.
        folder: where, that model's alone; llama.cpp reads the files as long as it runs.
        threads: for one token, and for a prompt.
        forms: of :data:`LLAMA`.

    Raises:
        ValueError: GGUF has no such model.
        RuntimeError: llama.cpp does not take it, or was built with AMX.
    """
    import ctypes

    import llama_cpp as lc

    if b"AMX_INT8 = 1" in lc.llama_print_system_info():  # 0.3.36 dies at the head of tied embeddings
        raise RuntimeError(
            "this llama.cpp was built with AMX, by which it crashes on this model's quantised head: build "
            "llama-cpp-python with CMAKE_ARGS=-DGGML_NATIVE=OFF and what else the processor has"
        )
    _silent.append(lc.llama_log_callback(lambda level, text, data: None))
    lc.llama_log_set(_silent[-1], ctypes.c_void_p(0))
    source = folder / "float32.gguf"
    if not source.exists():  # asked for form by form, it is written once
        write_gguf(dense, source)
    ways = {}
    for name, number in forms.items():
        path, settings = folder / f"{name}.gguf", lc.llama_model_quantize_default_params()
        settings.ftype, settings.nthread = number, os.cpu_count() or 1
        if lc.llama_model_quantize(str(source).encode(), str(path).encode(), ctypes.byref(settings)):
            raise RuntimeError(f"llama.cpp did not write {name}.")
        ways[f"llama.cpp {name}"] = _llama_way(path, threads)
    return ways


def read_bandwidth(threads: int) -> float:
    """Bytes a second of a plain sum over memory, by so many threads, which torch has from then on.

    The memory is on huge pages where there are some.
    """
    memory, times = torch.from_numpy(aligned(2**26, np.int64)), []
    memory.fill_(1)
    torch.set_num_threads(threads)
    for _ in range(5):
        times.append(timed(memory.sum))
    return memory.numel() * 8 / statistics.median(times)


def measure(
    ways: Mapping[str, Way],
    repeats: int,
    tokens: int,
    joules: ProcessorJoules | None = None,
    progress: Share | None = None,
) -> list[dict[str, Any]]:
    """Decode by all ways in turn, after a few tokens of each that compile it.

    Args:
        ways: by name.
        repeats: of each.
        tokens: of a repeat.
        joules: the processor's meter, where it has one.
        progress: is told the share of repeats that are done.

    Returns:
        A record a way: ``way``, ``seconds`` (of a token, the median), ``times`` (of every repeat),
        ``prompt_tokens_per_second``; ``share`` and ``bytes`` where zeros are skipped; ``joules`` (a token's,
        a mean, whatever else runs) with a meter.
    """
    prompts: dict[str, list[float]] = {name: [] for name in ways}
    for way in ways.values():
        way.decode(4)
        way.prompt()
    for repeat in range(repeats):
        for name, way in ways.items():
            before = 0.0 if joules is None else joules.joules
            with contextlib.nullcontext() if joules is None else joules:
                way.times.append(way.decode(tokens) / tokens)
            way.joules += 0.0 if joules is None else joules.joules - before
            if repeat < 3:
                prompts[name].append(way.prompt())
        if progress is not None:
            progress((repeat + 1) / repeats)
    rows = []
    for name, way in ways.items():
        row: dict[str, Any] = {"way": name, "seconds": statistics.median(way.times), "times": way.times}
        row["prompt_tokens_per_second"] = PROMPT / statistics.median(prompts[name])
        if way.fetched is not None:
            row["share"], row["bytes"] = way.fetched()
        if joules is not None:
            row["joules"] = way.joules / (repeats * tokens)
        rows.append(row)
    return rows
