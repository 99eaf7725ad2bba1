"""Time decoding token by token on a processor, batch 1: event-driven, our own dense models, and llama.cpp.

python recipes/benchmark/cpu_decoding.py --size 130m --threads 1 [--repeats 9 --llama]

Sizes: 130m with weights at random, 7m with those of the quickstart. Shares are those of inputs that fire,
0.62 as the quickstart's student has it (in_proj 0.72, out_proj 0.41) and 0.42, scaled alike; V_th of every
projection is set for them. In turn, in one process; medians. --llama writes the dense weights as GGUF and
needs the packages gguf and llama-cpp-python. Read bandwidth is measured in the same run.
"""

import argparse
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch

from neurons.cpu.memory import aligned
from spiking_mamba import SpikingMambaConfig, SpikingMambaForCausalLM, event_driven
from spiking_mamba.common.errors import fail_clearly
from spiking_mamba.common.progress import quiet
from spiking_mamba.model.cpu_decoder import CpuDecoder
from spiking_mamba.model.state_spaces import published_config
from spiking_mamba.reports.document import markdown_table

NEURON = {"class": "neurons.SILIFNode", "args": {"max_spike_count": 64}}
SHARES = {"62%": (0.724, 0.406), "42%": (0.49, 0.255)}  # of inputs that fire, in_proj and out_proj
QUICKSTART = Path(__file__).parents[1] / "quickstart"
LLAMA = {"F16": 1, "Q8_0": 7, "Q4_0": 2}  # llama.cpp's numbers for its formats
Way = Callable[[int], None]  # decodes so many tokens
_silent: object = None


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
def set_shares(model: SpikingMambaForCausalLM, shares: tuple[float, float]) -> None:
    """Set every V_th so that about this share of a projection's inputs fires, layer after layer."""

    def threshold(share: float) -> Callable:
        def set_it(projection: torch.nn.Module, args: tuple) -> None:
            size = args[0].abs().flatten()
            # half a quantum does not fire
            smallest = size.kthvalue(max(1, round((1 - share) * size.numel()))).values
            projection.initial_threshold = 2 * float(smallest)

        return set_it

    hooks = [
        getattr(block.mixer, name).register_forward_pre_hook(threshold(share))
        for block in model.backbone.layers
        for name, share in zip(("in_proj", "out_proj"), shares, strict=True)
    ]
    model(torch.randint(model.config.vocab_size, (1, 64)))
    for hook in hooks:
        hook.remove()


def decoder_way(decoder: CpuDecoder) -> Way:
    tokens = np.random.default_rng(0).integers(0, decoder.config.vocab_size, 4096).tolist()

    def run(count: int) -> None:
        for token in tokens[:count]:
            decoder.step(token)

    return run


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

    return run


def llama_way(path: Path, threads: int) -> Way:
    import llama_cpp as lc

    model_settings, settings = lc.llama_model_default_params(), lc.llama_context_default_params()
    model_settings.n_gpu_layers = 0
    settings.n_ctx, settings.n_threads, settings.n_threads_batch = 4096, threads, threads
    model = lc.llama_model_load_from_file(str(path).encode(), model_settings)
    context = lc.llama_init_from_model(model, settings)
    token = (lc.llama_token * 1)(1)

    def run(count: int) -> None:
        lc.llama_memory_clear(lc.llama_get_memory(context), True)
        for step in range(count):
            token[0] = step + 1
            if lc.llama_decode(context, lc.llama_batch_get_one(token, 1)):
                raise RuntimeError("llama.cpp did not decode a token.")
        lc.llama_get_logits_ith(context, -1)

    return run


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
        made = event_driven(dense, weights, states)
        ways[f"dense {weights}"] = decoder_way(CpuDecoder(made, threads))
    spiking = make(size, True)
    for name, shares in SHARES.items():
        if size != "7m" or name != "62%":  # the student's own thresholds give its own shares
            set_shares(spiking, shares)
        for weights in ("int8", "int4"):
            made = event_driven(spiking, weights, states)
            ways[f"event-driven {weights}, {name}"] = decoder_way(CpuDecoder(made, threads, shares))
    return ways


def read_bandwidth() -> float:
    """Bytes a second of one thread's plain sum over memory on huge pages."""
    memory, times = aligned(2**27, np.int64), []
    memory[:] = 1
    for _ in range(5):
        start = time.perf_counter()
        memory.sum()
        times.append(time.perf_counter() - start)
    return memory.nbytes / statistics.median(times)


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
    args = parser.parse_args()
    quiet()
    torch.set_num_threads(args.threads)
    dense = make(args.size, False)
    with tempfile.TemporaryDirectory() as folder:
        ways = llama_ways(dense, Path(folder), args.threads) if args.llama else {}
        ways |= own_ways(args.size, dense, args.threads, args.states)
        if args.captured:
            ways["dense bfloat16, captured"] = captured_way(dense)
        times: dict[str, list[float]] = {name: [] for name in ways}
        for run in ways.values():
            run(4)  # compiles
        for _ in range(args.repeats):
            for name, run in ways.items():
                start = time.perf_counter()
                run(args.tokens)
                times[name].append((time.perf_counter() - start) / args.tokens)
    median = {name: statistics.median(found) for name, found in times.items()}
    rivals = [name for name in ("llama.cpp Q8_0", "dense int8") if name in median]
    rows = [
        [name, f"{1 / s:.1f}", f"{1e3 * s:.3f}", *(f"{median[rival] / s:.2f}" for rival in rivals)]
        for name, s in median.items()
    ]
    print(f"{args.size}, {args.threads} thread(s), states in {args.states}, {args.repeats} repeats in turn")
    print(f"read bandwidth {read_bandwidth() / 1e9:.1f} GB/s; load {os.getloadavg()[0]:.1f}\n")
    print(markdown_table(["decoding", "tokens/s", "ms a token", *(f"over {r}" for r in rivals)], rows))


if __name__ == "__main__":
    main()
