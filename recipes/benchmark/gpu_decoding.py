"""Time decoding on an NVIDIA GPU, token by token, and its joules: event-driven beside all that is dense.

python recipes/benchmark/gpu_decoding.py --size 1.3b [--shares 0.63 0.42 --weights int8 int4 --out runs/gpu]

Weights are random; thresholds are set so that a given share of the projections' weights is fetched, as in
cpu_decoding.py. With --student and --teacher they are those of two folders, and spikes are as trained.
"dense bf16" is our model as compiled blocks in a CUDA graph; "dense int8" runs the kernels of the
event-driven one on activations rounded to int8, which also scale every 32 inputs: over dense bf16 it
shows what integers and fewer launches give together. What zeros give is a row over "event-driven, 100%".
Bytes and shares are those of one token, of a student means of 32. A token is a forward pass and an argmax,
greedily; medians of repeats, all ways in turn. "Of its floor": the time in which the bytes that this way
must move could be copied, at the speed of a copy in the same run. Joules are NVML's, of the whole GPU,
medians of repeats in turn, with its idle power, which is watched once, and without. --smoke: tiny shapes, on
a processor too.
"""

import argparse
import functools
import importlib.util
import itertools
import math
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, make_dataclass
from pathlib import Path
from typing import Any

import torch
from decoding import copy_bytes_per_second, rival
from gpu_models import Models, models_of, way_name
from gpu_tables import BF16, draw, table
from stopwatch import seconds_behind_a_prompt, seconds_of

from neurons.cupy.event_linear import plan as layouts
from spiking_mamba import EventDrivenMambaForCausalLM, SpikingMambaForCausalLM
from spiking_mamba.common.errors import RunError, fail_clearly
from spiking_mamba.common.machine import device_name
from spiking_mamba.common.progress import quiet
from spiking_mamba.common.provenance import provenance
from spiking_mamba.common.records import put_record, read_records
from spiking_mamba.model import cache as caches
from spiking_mamba.model.cuda.token import FusedToken, own_cache
from spiking_mamba.spikes.joules import JouleMeter, NoEnergyCounter

RECORDS = "gpu_decoding.jsonl"
JOULE_REPEATS = 3
PROMPTS_TIMED = 7  # of each length, in turn
PROMPTS_TOKENS = 8  # as many times the tokens behind a prompt: its own time scatters by that of dozens
RIVAL = "mamba-ssm, CUDA graph"


@dataclass
class Way:
    """A way to decode.

    Attributes:
        decode: decodes so many tokens.
        bytes: that a token must move.
        share: of the projections' weights that it fetches.
        graph: a token without the host, where there is one.
        prompts: whether a prompt is in it each time.
    """

    decode: Callable[[int], None]
    bytes: float
    share: float | None = None
    graph: torch.cuda.CUDAGraph | None = None
    prompts: bool = False
    times: list[float] = field(default_factory=list)


@torch.no_grad()
def own_way(
    model: SpikingMambaForCausalLM, prompt: torch.Tensor, bytes_: float, share: float | None = None
) -> Way:
    """Ours, captured on CUDA."""
    batch = len(prompt)
    output = model(prompt, use_cache=True, logits_to_keep=1)
    state = [output.logits[:, -1:].argmax(-1), output.cache]

    @torch.no_grad()
    def decode(count: int) -> None:
        token, cache = state
        for _ in range(count):
            token = model(token, cache=cache, use_cache=True).logits[:, -1:].argmax(-1)
        state[0] = token

    decode(3)  # compiles and captures
    graph = None if model.graphs is None else model.graphs.captured.get(batch)
    return Way(decode, bytes_, share, graph)


def dense_bytes(model: SpikingMambaForCausalLM, batch: int) -> float:
    """Weights once, but for the rows of the embedding that are not asked for, and states read and written."""
    config = model.config
    channels = config.expand * config.hidden_size + 2 * config.n_groups * config.state_size
    each = config.num_heads * config.head_dim * config.state_size + channels * config.conv_kernel
    width = model.dtype.itemsize
    weights = sum(p.numel() for p in {id(p): p for p in model.parameters()}.values())
    if not config.tie_word_embeddings:
        weights -= model.backbone.embeddings.weight.numel()
    return width * (weights + 2.0 * batch * config.number_of_blocks("mamba") * each)


@torch.no_grad()
def event_bytes(
    made: EventDrivenMambaForCausalLM, prompt: torch.Tensor, watched: int = 1
) -> tuple[float, float]:
    """The same of integers, of whose projections some rows are fetched; and their share.

    Means over the prompt's last tokens, so many as are watched.
    """
    from spiking_mamba.model.cuda import kernels, reference

    cache = made(prompt[:, :-watched], use_cache=True, logits_to_keep=1).cache
    cache = own_cache(cache, getattr(torch, made.config.states))
    fused = FusedToken(made, kernels if made.device.type == "cuda" else reference, keep=True)
    matrices = [getattr(b.mixer, name) for b in made.backbone.layers for name in ("in_proj", "out_proj")]
    fetched = whole = 0.0
    for place in range(-watched, 0):
        fused(prompt[:, place, None].contiguous(), cache)
        for kept, layer in zip(fused.kept, matrices, strict=True):
            scales = 0 if layer.group_scale is None else layer.group_scale.numel()
            fetched += ((kept.inputs != 0).any(0).sum().item() * layer.weight.shape[1] + scales) / watched
            whole += (layer.weight.numel() + scales) / watched
    head = made.lm_head.weight.numel()
    head += 0 if made.lm_head.group_scale is None else made.lm_head.group_scale.numel()
    small = sum(
        p.numel() * p.element_size() for name, p in made.named_parameters() if "embeddings" not in name
    )
    small += sum(8 * layer.scale.numel() for layer in (*matrices, made.lm_head))
    states = sum(
        2 * states[key].numel() * states[key].element_size() for states, key in caches.tensors(cache)
    )
    return fetched + head + small + states, fetched / whole


def makers(models: Models, batch: int, args: argparse.Namespace) -> Iterator[tuple[str, Callable[[], Way]]]:
    """Every way at a batch size, and what makes it."""
    prompt = models.prompt(batch)
    if batch in args.dense_batches:
        if args.rival:
            yield RIVAL, lambda: rival_way(models, batch, args)
        yield BF16, lambda: own_way(models.bf16(), prompt, dense_bytes(models.bf16(), batch))
    for weights, share in itertools.product(args.weights, (None, *models.shares)):

        def make(share: float | str | None = share, weights: str = weights) -> Way:
            made = models.integers(share, weights)
            return own_way(made, prompt, *event_bytes(made, prompt, models.watched))

        yield way_name(share, weights), make
        if args.generate and share is not None:

            def generate(share: float | str = share, weights: str = weights) -> Way:
                return generate_way(models.integers(share, weights), prompt, models.watched)

            yield f"{way_name(share, weights)}, generate()", generate


def leave_prompts_untuned() -> None:
    """Let a prompt's chunked scan, which is not timed, take its smallest blocks: tuning takes minutes."""
    from triton.runtime.autotuner import Autotuner

    tuned = Autotuner.run

    def run(self: Autotuner, *args: Any, **kwargs: Any) -> Any:
        if any(part in self.base_fn.__name__ for part in ("chunk", "state_passing")):
            self.configs = [min(self.configs, key=lambda c: (math.prod(c.kwargs.values()), c.num_stages))]
        return tuned(self, *args, **kwargs)

    Autotuner.run = run


def rival_way(models: Models, batch: int, args: argparse.Namespace) -> Way:
    run = rival(models.config, args)
    prompt = models.prompt(batch)

    def decode(count: int) -> None:
        run(prompt, count)

    with torch.no_grad():
        decode(4)
    return Way(decode, dense_bytes(models.bf16(), batch), prompts=True)


def generate_way(made: EventDrivenMambaForCausalLM, prompt: torch.Tensor, watched: int) -> Way:
    """What users call, whatever loop it takes around a token."""

    def decode(count: int) -> None:
        length = {"max_new_tokens": count, "min_new_tokens": count}
        made.generate(prompt, attention_mask=torch.ones_like(prompt), do_sample=False, **length)

    decode(4)
    return Way(decode, *event_bytes(made, prompt, watched), prompts=True)


@torch.no_grad()
def seconds_a_token(way: Way, tokens: int) -> float:
    """Of decoding so many; where a prompt is in it, by the difference of two lengths."""
    seconds = functools.partial(seconds_of, way.decode)
    if not way.prompts:
        return seconds(tokens) / tokens
    return seconds_behind_a_prompt(seconds, tokens // 4, PROMPTS_TOKENS * tokens, PROMPTS_TIMED)


def replay_milliseconds(graph: torch.cuda.CUDAGraph, repeats: int = 30) -> float:
    times = []
    for _ in range(repeats):
        marks = [torch.cuda.Event(enable_timing=True) for _ in range(2)]
        marks[0].record()
        graph.replay()
        marks[1].record()
        torch.cuda.synchronize()
        times.append(marks[0].elapsed_time(marks[1]))
    return statistics.median(times)


@torch.no_grad()
def joules(ways: dict[str, Way], args: argparse.Namespace, batch: int) -> dict[str, dict[str, Any]]:
    """Millijoules a token of every way, in turn; nothing where nothing counts them."""
    counted = {name: way for name, way in ways.items() if not way.prompts and args.seconds}
    try:
        idle = JouleMeter(idle_seconds=max(1.0, args.seconds)).idle_watts if counted else 0.0
    except NoEnergyCounter as error:
        print(error)
        return {}
    found: dict[str, list[tuple[float, float]]] = {name: [] for name in counted}
    for _ in range(JOULE_REPEATS):
        for name, way in counted.items():
            count = max(4, round(args.seconds / statistics.median(way.times)))
            meter = JouleMeter(idle_seconds=0.2)  # lets the GPU rest; the idle power is that of above
            with meter:
                way.decode(count)
            result = meter.result(count * batch)
            found[name].append((result["joules_total_per_token"], result["seconds"] / count / batch))
    return {name: in_millijoules(each, idle) for name, each in found.items()}


def in_millijoules(each: list[tuple[float, float]], idle: float) -> dict[str, Any]:
    """Of joules and seconds a token, one pair a repeat, and the idle power in watts."""
    total = [1e3 * joules for joules, _ in each]
    net = [1e3 * (joules - idle * seconds) for joules, seconds in each]
    watts = [joules / seconds for joules, seconds in each]
    medians = {"mJ": total, "mJ_net": net, "watts": watts}
    return {key: statistics.median(values) for key, values in medians.items()} | {
        "mJ_each": total,
        "idle_watts": idle,
    }


def measure(models: Models, batch: int, args: argparse.Namespace, about: dict[str, Any]) -> None:
    """All ways at a batch size; each is put among the records when it is known."""
    ways: dict[str, Way] = {}
    for name, make in makers(models, batch, args):
        start = time.perf_counter()
        try:
            ways[name] = make()
        except Exception as error:  # one that cannot run here leaves the others
            print(f"{name}, batch {batch}: left out: {type(error).__name__}: {str(error)[:300]}", flush=True)
        else:
            print(f"{name}, batch {batch}: ready in {time.perf_counter() - start:.0f} s", flush=True)
    for _ in range(args.repeats):
        for way in ways.values():
            way.times.append(seconds_a_token(way, args.tokens))
    counted = joules(ways, args, batch)
    for name, way in ways.items():
        each = statistics.median(way.times)
        record = {"size": args.size, "batch": batch, "way": name, "seconds": each, "times": way.times}
        record |= {"bytes": way.bytes, "share": way.share} | about
        if way.graph is not None:
            record["replay_ms"] = replay_milliseconds(way.graph)
        record |= counted.get(name, {})
        put_record(args.out / RECORDS, record, ("size", "batch", "way"))
        print(f"{name}, batch {batch}: {1e3 * each:.3f} ms", flush=True)


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--size", default="1.3b", help="130m, 370m, 780m, 1.3b or 2.7b")
    parser.add_argument("--student", help="folder of a student instead, as it was trained, with --teacher")
    parser.add_argument("--teacher", help="folder of the dense model beside it")
    parser.add_argument("--layers", type=int, help="fewer layers, for a trial")
    parser.add_argument("--shares", type=float, nargs="+", default=[1.0, 0.63, 0.42])
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 2, 4, 8])
    parser.add_argument("--dense-batches", type=int, nargs="*", default=[1, 8], help="of what is compiled")
    parser.add_argument("--weights", nargs="+", default=["int8"], choices=("int8", "int4"))
    parser.add_argument("--states", default="bfloat16", choices=("float32", "bfloat16"))
    parser.add_argument("--tokens", type=int, default=128, help="a repeat's")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=1.5, help="a repeat of joules; 0: none")
    parser.add_argument("--limit", type=float, default=3600, help="seconds after which no batch begins")
    parser.add_argument("--cluster", type=int, help="blocks of a cluster at most, 1 for none; tuning")
    parser.add_argument("--warps", type=int, help="that a launch should have; tuning")
    parser.add_argument("--generate", action="store_true", help="also generate(), as users call it")
    parser.add_argument("--rival", action="store_true", help="with mamba-ssm, where it is installed")
    parser.add_argument("--smoke", action="store_true", help="tiny shapes, to see that all of it runs")
    parser.add_argument("--out", type=Path, default=Path("runs/gpu_decoding"))
    args = parser.parse_args()
    args.device = "cuda" if torch.cuda.is_available() else "cpu"
    if args.device == "cpu" and not args.smoke:
        raise ValueError("Decoding on a GPU needs one; --smoke runs anywhere.")
    if (args.student is None) != (args.teacher is None):
        raise ValueError("--student and --teacher go together.")
    if args.student is not None:
        args.size, args.rival = Path(args.student).resolve().name, False
    layouts.CLUSTER = args.cluster or layouts.CLUSTER
    layouts.WARPS_WANTED = args.warps or layouts.WARPS_WANTED
    if args.smoke:
        args.size = "smoke" if args.student is None else args.size
        args.tokens, args.repeats, args.seconds = 8, 2, min(args.seconds, 0.2)
    if args.rival and importlib.util.find_spec("mamba_ssm") is None:
        print("mamba-ssm: not measured, since it is not installed")
        args.rival = False
    return args


def show(args: argparse.Namespace, about: dict[str, Any]) -> None:
    """Print what is known of a size so far, and put it into the folder as a table and a picture."""
    records = [r for r in read_records(args.out / RECORDS) if r["size"] == args.size]
    if not records:
        raise RunError("Nothing runs here, for the reasons given above.")
    text = f"{device_name()}, copy {(about['copy_bytes_per_second'] or 0) / 1e12:.2f} TB/s; "
    text += f"weights {', '.join(args.weights)}, states {args.states}; "
    text += f"{args.repeats} repeats of {args.tokens} tokens in turn\n\n{table(records)}"
    print(text, flush=True)
    (args.out / f"{args.size}.md").write_text(text + "\n")
    draw(records, args.out / f"{args.size}.png")


@fail_clearly()
def main() -> None:
    args, start = arguments(), time.perf_counter()
    quiet()
    if importlib.util.find_spec("mamba_ssm") is not None:
        leave_prompts_untuned()
    models = models_of(args)
    kept = vars(args) | {"out": args.out.name}
    about: dict[str, Any] = {"provenance": provenance(make_dataclass("Arguments", kept)(**kept))}
    about["copy_bytes_per_second"] = copy_bytes_per_second() if args.device == "cuda" else None
    for batch in args.batches:
        if time.perf_counter() - start > args.limit:
            print(f"batch {batch}: left out, the time is over")
            continue
        measure(models, batch, args, about)
        show(args, about)


if __name__ == "__main__":
    main()
