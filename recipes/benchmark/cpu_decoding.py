"""Time decoding token by token on a processor, batch 1: event-driven, our own dense models, and llama.cpp.

python recipes/benchmark/cpu_decoding.py --size 130m --threads 1 [--llama --captured --out runs/cpu]

Sizes: 130m with weights at random, 7m with those of the quickstart. Shares are those of inputs that fire,
0.62 as the quickstart's student has it (in_proj 0.72, out_proj 0.41) and 0.42, scaled alike; V_th of every
projection is set for them. What is timed of ours is generate(), from its first token to its last. In turn, in
one process; medians. --llama writes the dense weights as GGUF and needs the packages gguf and
llama-cpp-python. Read bandwidth is measured in the same run. --shapes 1.3b times the projections alone.
"""

import argparse
import importlib.util
import json
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from shares import NEURON, set_shares
from transformers.generation.streamers import BaseStreamer

from neurons.cpu.linear import PackedLinear
from neurons.cpu.memory import aligned
from spiking_mamba import (
    EventDrivenMambaForCausalLM,
    SpikingMambaConfig,
    SpikingMambaForCausalLM,
    event_driven,
)
from spiking_mamba.common.errors import fail_clearly
from spiking_mamba.common.progress import quiet
from spiking_mamba.model.cpu_decoder import CpuDecoder
from spiking_mamba.model.state_spaces import published_config
from spiking_mamba.reports.document import markdown_table
from spiking_mamba.reports.figures import COLOURS, picture

SHARES = {"62%": (0.724, 0.406), "42%": (0.49, 0.255)}  # of inputs that fire, in_proj and out_proj
QUICKSTART = Path(__file__).parents[1] / "quickstart"
LLAMA = {"F16": 1, "Q8_0": 7, "Q4_0": 2}  # llama.cpp's numbers for its formats
SHAPES = {"1.3b": ((2048, 8512), (4096, 2048)), "130m": ((768, 3352), (1536, 768))}  # in, out of projections
PROMPT = 256  # tokens
_silent: object = None


@dataclass
class Way:
    """A way to decode.

    Attributes:
        decode: seconds that so many tokens take. prompt: seconds of a prompt of ``PROMPT`` tokens.
        fetched: share of projections' weights that a token reads, and its bytes, after decoding.
        parts: shares of a token's time, and the bytes of each part.
    """

    decode: Callable[[int], float]
    prompt: Callable[[], float]
    fetched: Callable[[], tuple[float, float]] | None = None
    parts: Callable[[], dict[str, tuple[float, float]]] | None = None
    times: list[float] = field(default_factory=list)


def timed(function: Callable[[], object]) -> float:
    start = time.perf_counter()
    function()
    return time.perf_counter() - start


class Clock(BaseStreamer):
    """When tokens came."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def put(self, value: torch.Tensor) -> None:
        self.times.append(time.perf_counter())

    def end(self) -> None:
        pass


def make(size: str, spiking: bool) -> SpikingMambaForCausalLM:
    """The model, float32, in evaluation mode."""
    if size == "7m":
        folder = QUICKSTART / ("student" if spiking else "teacher")
        return SpikingMambaForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    torch.manual_seed(0)
    published = published_config(f"state-spaces/mamba2-{size}").to_dict()
    fields = {key: value for key, value in published.items() if key != "model_type"}
    return SpikingMambaForCausalLM(
        SpikingMambaConfig(**fields | {"neuron": NEURON if spiking else None})
    ).eval()


@torch.no_grad()
def prompt_seconds(model: SpikingMambaForCausalLM) -> float:
    ids = torch.arange(PROMPT)[None] % model.config.vocab_size
    return timed(lambda: model(ids, use_cache=True, logits_to_keep=1))


def event_way(made: EventDrivenMambaForCausalLM, threads: int) -> Way:
    made.set_decoding("compiled", threads)
    made.generation_config.eos_token_id = None
    prompt = torch.randint(made.config.vocab_size, (1, 32), generator=torch.Generator().manual_seed(0))

    def decode(count: int) -> float:
        clock = Clock()
        made.generate(
            prompt,
            attention_mask=torch.ones_like(prompt),
            max_new_tokens=count + 1,
            do_sample=False,
            streamer=clock,
        )
        return clock.times[-1] - clock.times[1]  # the prompt comes first, then what its forward pass gives

    def fetched() -> tuple[float, float]:
        found = made.decoders.fetched()
        return found.share, found.total

    def parts() -> dict[str, tuple[float, float]]:
        shares = [1.0, 1.0] if made.config.neuron is None else made.decoders.firing()
        decoder = CpuDecoder(made, threads, tuple(shares[:2]), timed=True)
        rng = np.random.default_rng(0)
        for token in rng.integers(0, made.config.vocab_size, 40).tolist():
            decoder.step(token)
        found = decoder.fetched()
        bytes_ = {"in_proj": found.in_proj, "out_proj": found.out_proj, "head": found.head}
        bytes_ |= {"mixing": found.states, "rest": found.rest - found.states}
        return {name: (share, bytes_[name]) for name, share in decoder.parts().items()}

    return Way(decode, lambda: prompt_seconds(made), fetched, parts)


def captured_way(model: SpikingMambaForCausalLM) -> Way:
    model = model.to(torch.bfloat16)
    model.capture_decoding()
    state: list = []

    @torch.no_grad()
    def run(count: int) -> None:
        if not state:
            state.append(model(torch.zeros(1, 8, dtype=torch.long), use_cache=True).cache)
        for token in range(count):
            model(torch.full((1, 1), token), cache=state[0], use_cache=True)

    return Way(lambda count: timed(lambda: run(count)), lambda: prompt_seconds(model))


def llama_way(path: Path, threads: int) -> Way:
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


def llama_ways(dense: SpikingMambaForCausalLM, folder: Path, threads: int) -> dict[str, Way]:
    import ctypes

    import llama_cpp as lc

    from spiking_mamba.model.gguf import write_gguf

    global _silent  # llama.cpp calls it as long as it runs
    _silent = lc.llama_log_callback(lambda level, text, data: None)
    lc.llama_log_set(_silent, ctypes.c_void_p(0))
    source = folder / "float32.gguf"
    write_gguf(dense, source)
    ways = {}
    for name, number in LLAMA.items():
        path, settings = folder / f"{name}.gguf", lc.llama_model_quantize_default_params()
        settings.ftype, settings.nthread = number, os.cpu_count() or 1
        if lc.llama_model_quantize(str(source).encode(), str(path).encode(), ctypes.byref(settings)):
            raise RuntimeError(f"llama.cpp did not write {name}.")
        ways[f"llama.cpp {name}"] = llama_way(path, threads)
    return ways


def own_ways(size: str, dense: SpikingMambaForCausalLM, threads: int, states: str) -> dict[str, Way]:
    ways = {}
    for weights in ("int8", "int4"):
        ways[f"dense {weights}"] = event_way(event_driven(dense, weights, states), threads)
    spiking = make(size, True)
    for name, shares in SHARES.items():
        if size != "7m" or name != "62%":  # the student's own thresholds give its own shares
            set_shares(spiking, shares)
        for weights in ("int8", "int4"):
            ways[f"event-driven {weights}, {name}"] = event_way(
                event_driven(spiking, weights, states), threads
            )
    return ways


def read_bandwidth(threads: int) -> float:
    """Bytes a second of a plain sum over memory on huge pages, by so many threads."""
    memory, times = torch.from_numpy(aligned(2**26, np.int64)), []
    memory.fill_(1)
    torch.set_num_threads(threads)
    for _ in range(5):
        times.append(timed(memory.sum))
    return memory.numel() * 8 / statistics.median(times)


def projections_alone(shapes: str, repeats: int) -> str:
    """Decoding's products of random int8 weights at these shapes on one thread: everything read, and rows."""
    rng, layers = np.random.default_rng(0), 8  # more bytes than any cache holds
    work: dict[str, list[tuple[PackedLinear, np.ndarray]]] = {}
    for name, shares in ({"dense": (1.0, 1.0)} | SHARES).items():
        work[name] = []
        for (inputs, outputs), share in zip(SHAPES[shapes] * layers, shares * layers, strict=True):
            weight = rng.integers(-127, 128, (inputs, outputs), np.int8)
            spikes = np.where(rng.random((1, inputs)) < share, rng.integers(1, 9, (1, inputs)), 0)
            layout = "tiles" if name == "dense" else "rows"
            work[name].append((PackedLinear(weight, None, layout), spikes.astype(np.int8)))
    times: dict[str, list[float]] = {name: [] for name in work}
    for _ in range(repeats + 1):  # the first compiles
        for name, own in work.items():
            times[name].append(timed(lambda own=own: [packed.sums(spikes) for packed, spikes in own]))
    median = {name: statistics.median(seconds[1:]) / layers for name, seconds in times.items()}
    rows = [[name, f"{1e6 * s:.0f}", f"{median['dense'] / s:.2f}"] for name, s in median.items()]
    return markdown_table([f"int8 projections, {shapes} shapes", "us a layer", "over dense int8"], rows)


def measure(args: argparse.Namespace, ways: dict[str, Way]) -> list[dict[str, Any]]:
    """A row a way, medians of repeats in turn."""
    prompts: dict[str, list[float]] = {name: [] for name in ways}
    for way in ways.values():
        way.decode(4)  # compiles
        way.prompt()
    for repeat in range(args.repeats):
        for name, way in ways.items():
            way.times.append(way.decode(args.tokens) / args.tokens)
            if repeat < 3:
                prompts[name].append(way.prompt())
    rows = []
    for name, way in ways.items():
        row = {"way": name, "seconds": statistics.median(way.times)}
        row["prompt_tokens_per_second"] = PROMPT / statistics.median(prompts[name])
        if way.fetched is not None:
            row["share"], row["bytes"] = way.fetched()
        if way.parts is not None and args.parts and name.startswith("event-driven"):
            row["parts"] = way.parts()
        rows.append(row)
    return rows


def tables(rows: list[dict[str, Any]], bandwidth: float) -> str:
    """What was measured, and each part's time beside the time that its bytes need."""
    seconds = {row["way"]: row["seconds"] for row in rows}
    rivals = [name for name in ("llama.cpp Q8_0", "dense int8", "dense int4") if name in seconds]
    body, parts = [], []
    for row in rows:
        s, share = row["seconds"], row.get("share")
        of_read = f"{row['bytes'] / s / bandwidth:.0%}" if share is not None else ""
        body.append(
            [
                row["way"], f"{1 / s:.1f}", f"{1e3 * s:.3f}",
                *(f"{seconds[rival] / s:.2f}" for rival in rivals),
                "" if share is None else f"{share:.2f}", of_read, f"{row['prompt_tokens_per_second']:.0f}",
            ]
        )  # fmt: skip
        if "parts" in row:
            cells = (f"{1e3 * s * t:.3f} ({1e3 * b / bandwidth:.3f})" for t, b in row["parts"].values())
            parts.append([row["way"], *cells])
    heads = ["decoding", "tokens/s", "ms a token", *(f"over {r}" for r in rivals)]
    first = markdown_table([*heads, "share fetched", "of bandwidth", "prompt tokens/s"], body)
    names = next((list(row["parts"]) for row in rows if "parts" in row), [])
    second = markdown_table(["ms a token (its bytes alone)", *names], parts) if parts else ""
    return f"{first}\n\n{second}"


def draw(rows: list[dict[str, Any]], title: str, path: Path) -> None:
    """Tokens a second as bars, what others offer in grey."""
    with picture(path, 8, 0.8 + 0.36 * len(rows)) as (_, axes):
        names = [row["way"] for row in rows]
        kinds = ["llama.cpp", "dense", "event-driven"]
        colours = dict(zip(kinds, ("0.6", *COLOURS[:2]), strict=True))
        bars = axes.barh(
            names,
            [1 / row["seconds"] for row in rows],
            color=[colours[next(k for k in kinds if name.startswith(k))] for name in names],
        )
        axes.bar_label(bars, fmt="%.0f", padding=3)
        axes.invert_yaxis()
        axes.set_xlabel("tokens a second")
        axes.set_title(title)
        axes.margins(x=0.1)


@fail_clearly()
def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--size", default="130m", help="7m (the quickstart's), 130m, 370m, ...")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--tokens", type=int, default=24, help="a repeat's")
    parser.add_argument("--states", default="bfloat16", choices=("float32", "bfloat16"))
    parser.add_argument("--llama", action="store_true", help="with llama.cpp")
    parser.add_argument("--captured", action="store_true", help="with our bfloat16 model, captured")
    parser.add_argument("--parts", action="store_true", help="with what each part of a token takes, on x86")
    parser.add_argument("--shapes", choices=SHAPES, help="the projections alone, at these shapes")
    parser.add_argument("--out", type=Path, help="a folder for a table, a picture and the numbers")
    args = parser.parse_args()
    quiet()
    if args.shapes:
        print(projections_alone(args.shapes, args.repeats))
        return
    torch.set_num_threads(args.threads)
    missing = [name for name in ("llama_cpp", "gguf") if importlib.util.find_spec(name) is None]
    if args.llama and missing:
        print(f"llama.cpp: not measured, since {' and '.join(missing)} cannot be imported")
    dense = make(args.size, False)
    with tempfile.TemporaryDirectory() as folder:
        ways = llama_ways(dense, Path(folder), args.threads) if args.llama and not missing else {}
        ways |= own_ways(args.size, dense, args.threads, args.states)
        if args.captured:
            ways["dense bfloat16, captured"] = captured_way(dense)
        before = os.getloadavg()[0]
        rows = measure(args, ways)
    bandwidth = read_bandwidth(args.threads)
    title = f"{args.size}, {args.threads} thread(s), states in {args.states}"
    text = f"{title}, {args.repeats} repeats of {args.tokens} tokens in turn\n"
    text += f"read bandwidth {bandwidth / 1e9:.1f} GB/s; load before {before:.1f}\n\n"
    text += tables(rows, bandwidth)
    print(text)
    if args.out:
        args.out.mkdir(parents=True, exist_ok=True)
        (args.out / "table.md").write_text(text + "\n")
        (args.out / "results.json").write_text(json.dumps({"bandwidth": bandwidth, "rows": rows}, indent=1))
        draw(rows, title, args.out / "decoding.png")


if __name__ == "__main__":
    main()
