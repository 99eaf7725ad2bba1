"""Time decoding, greedily, token by token: ours dense and spiking, and mamba-ssm's model with CUDA graphs.

python recipes/benchmark/decoding.py --size 130m [--batch 1 --tokens 256]

Weights are bfloat16 on a GPU, float32 elsewhere. Ours decode captured (`capture_decoding`) and plainly, in a
loop of a forward pass and an argmax, and by `generate()`. "Share of floor": the time in which the GPU could
read the weights once, at the speed of a copy measured in the same run, over the time of a token.
"""

import argparse
import functools
import importlib.util
import json
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from stopwatch import seconds_behind_a_prompt, seconds_of
from versions import about, line

from neurons import set_backend
from spiking_mamba import SpikingMambaConfig, SpikingMambaForCausalLM
from spiking_mamba.common.errors import RunError, fail_clearly
from spiking_mamba.common.machine import device_name
from spiking_mamba.common.progress import quiet
from spiking_mamba.model import scan as ssd
from spiking_mamba.model.state_spaces import published_config
from spiking_mamba.reports.document import markdown_table

NEURON = {"class": "neurons.SILIFNode", "args": {"max_spike_count": 4}}
WAYS = ("plain", "captured", "generate()")
PROMPTS_TIMED = 3  # of each length a repeat
Way = Callable[[torch.Tensor, int], None]  # decodes so many tokens behind a prompt


def make(
    config: SpikingMambaConfig, args: argparse.Namespace, neuron: dict | None
) -> SpikingMambaForCausalLM:
    torch.manual_seed(0)
    fields = {k: v for k, v in config.to_dict().items() if k != "model_type"} | {"neuron": neuron}
    with torch.device(args.device):
        model = SpikingMambaForCausalLM(SpikingMambaConfig(**fields))
    model.to(args.device, torch.bfloat16 if args.device == "cuda" else torch.float32).eval()
    set_backend(model, "torch")
    return model


def loop(model: SpikingMambaForCausalLM, prompt: torch.Tensor, tokens: int) -> None:
    output = model(prompt, use_cache=True)
    for _ in range(tokens):
        token = output.logits[:, -1:].argmax(-1)
        output = model(token, cache=output.cache, use_cache=True)


def generate(model: SpikingMambaForCausalLM, prompt: torch.Tensor, tokens: int) -> None:
    length = {"max_new_tokens": tokens, "min_new_tokens": tokens}
    model.generate(prompt, attention_mask=torch.ones_like(prompt), do_sample=False, **length)


def rival(config: SpikingMambaConfig, args: argparse.Namespace) -> Way:
    ssd._triton_kernels()  # knows how to import a mamba-ssm that was built without CUDA
    from mamba_ssm.models.config_mamba import MambaConfig
    from mamba_ssm.models.mixer_seq_simple import MambaLMHeadModel

    model = MambaLMHeadModel(
        MambaConfig(
            d_model=config.hidden_size,
            n_layer=config.num_hidden_layers,
            vocab_size=config.vocab_size,
            ssm_cfg={"layer": "Mamba2", "use_mem_eff_path": False},
        ),
        device=args.device,
        dtype=torch.bfloat16,
    ).eval()

    def run(prompt: torch.Tensor, tokens: int) -> None:
        model.generate(input_ids=prompt, max_length=prompt.shape[1] + tokens, cg=True, top_k=1)

    return run


def copy_bytes_per_second() -> float:
    source = torch.empty(2**30, dtype=torch.uint8, device="cuda")
    target, times = torch.empty_like(source), []
    for _ in range(12):
        marks = [torch.cuda.Event(enable_timing=True) for _ in range(2)]
        marks[0].record()
        target.copy_(source)
        marks[1].record()
        torch.cuda.synchronize()
        times.append(marks[0].elapsed_time(marks[1]) / 1e3)
    return 2 * source.numel() / statistics.median(times)


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--size", default="130m", help="130m, 370m, 780m, 1.3b or 2.7b")
    parser.add_argument("--layers", type=int, help="fewer layers, for a trial")
    parser.add_argument("--only", nargs="+", choices=WAYS, default=WAYS, help="of our ways")
    for name, default in {"batch": 1, "prompt": 64, "tokens": 256, "repeats": 5}.items():
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--out", type=Path, help="folder for decoding-SIZE.json")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    return parser.parse_args()


def ways_to_decode(
    config: SpikingMambaConfig, args: argparse.Namespace
) -> tuple[dict[str, Way], SpikingMambaForCausalLM]:
    """What is to be timed, by name, and the last of our models."""
    ways: dict[str, Way] = {}
    if args.device == "cuda" and importlib.util.find_spec("mamba_ssm"):
        ways["mamba-ssm, CUDA graph"] = rival(config, args)
    for kind, neuron in (("dense", None), ("spiking", NEURON)):
        if "plain" in args.only:
            model = make(config, args, neuron)
            ways[f"{kind}, plain"] = lambda p, n, model=model: loop(model, p, n)
        if set(args.only) - {"plain"}:
            model = make(config, args, neuron)
            model.capture_decoding()
        if "captured" in args.only:
            ways[f"{kind}, captured"] = lambda p, n, model=model: loop(model, p, n)
        if "generate()" in args.only:
            ways[f"{kind}, captured, generate()"] = lambda p, n, model=model: generate(model, p, n)
    return ways, model


@torch.no_grad()
def seconds_a_token(
    ways: dict[str, Way], prompt: torch.Tensor, args: argparse.Namespace
) -> dict[str, list[float]]:
    """Each way's time of a token, once a repeat; ways that do not run here are left out."""
    times: dict[str, list[float]] = {}
    for name, run in ways.items():
        start = time.perf_counter()
        try:
            run(prompt, 4)
            times[name] = []
            print(f"{name}: the first call took {time.perf_counter() - start:.0f} s", file=sys.stderr)
        except Exception as error:
            print(f"{name} does not run here and is left out: {type(error).__name__}: {str(error)[:200]}")
    if not times:
        raise RunError("Nothing runs here, for the reasons given above.")
    for _ in range(args.repeats):
        for name, own in times.items():  # in turn
            seconds = functools.partial(seconds_of, ways[name], prompt)
            own.append(seconds_behind_a_prompt(seconds, args.tokens // 4, args.tokens, PROMPTS_TIMED))
    return times


@fail_clearly()
def main() -> None:
    args = parse_arguments()
    quiet()
    config = published_config(f"state-spaces/mamba2-{args.size}")
    config.num_hidden_layers = args.layers or config.num_hidden_layers
    cuda = args.device == "cuda"
    prompt = torch.randint(0, config.vocab_size, (args.batch, args.prompt), device=args.device)
    ways, model = ways_to_decode(config, args)
    weights = 2 * sum(p.numel() for p in model.parameters())
    floor = weights / copy_bytes_per_second() if cuda else float("nan")
    times = seconds_a_token(ways, prompt, args)
    if args.out:
        args.out.mkdir(parents=True, exist_ok=True)
        record = about() | {"arguments": sys.argv[1:], "floor": floor if cuda else None, "seconds": times}
        (args.out / f"decoding-{args.size}.json").write_text(json.dumps(record, indent=1))
    print(line())
    median = {name: statistics.median(seconds) for name, seconds in times.items()}
    first = next(iter(median.values()))
    rows = [
        [
            name,
            f"{args.batch / s:.0f}",
            f"{1e3 * s:.3f}",
            f"{first / s:.2f}",
            f"{floor / s:.0%}" if cuda else "-",
        ]
        for name, s in median.items()
    ]
    print(f"{args.size}, batch {args.batch}, {device_name()}; floor {1e3 * floor:.3f} ms\n")
    header = ["decoding", "tokens/s", "ms a token", f"speed / {next(iter(median))}", "share of floor"]
    print(markdown_table(header, rows))


if __name__ == "__main__":
    main()
