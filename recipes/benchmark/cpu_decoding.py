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
from pathlib import Path
from typing import Any

import numpy as np
import torch
from shares import NEURON, set_shares

from neurons.cpu.linear import PackedLinear
from spiking_mamba import (
    EventDrivenMambaForCausalLM,
    SpikingMambaConfig,
    SpikingMambaForCausalLM,
    event_driven,
)
from spiking_mamba.common.errors import fail_clearly
from spiking_mamba.common.progress import quiet
from spiking_mamba.data import draw_rows
from spiking_mamba.evaluation.cpu_speed import (
    captured_way,
    event_way,
    llama_ways,
    measure,
    read_bandwidth,
    timed,
)
from spiking_mamba.model.cpu_decoder import CpuDecoder
from spiking_mamba.model.event_driven import WEIGHTS
from spiking_mamba.model.state_spaces import published_config
from spiking_mamba.model.tokenizer import load_tokenizer
from spiking_mamba.reports.decoding import draw_speeds
from spiking_mamba.reports.document import markdown_table

SHARES = {"62%": (0.724, 0.406), "42%": (0.49, 0.255)}  # of inputs that fire, in_proj and out_proj
TOLERANCE = 0.005  # of perplexity, by estimate, that 4 bits may cost beyond layers in int8
QUICKSTART = Path(__file__).parents[1] / "quickstart"
SHAPES = {"1.3b": ((2048, 8512), (4096, 2048)), "130m": ((768, 3352), (1536, 768))}  # in, out of projections


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


def parts(made: EventDrivenMambaForCausalLM, threads: int) -> dict[str, tuple[float, float]]:
    """Shares of a token's time, and the bytes of each part."""
    decoder = CpuDecoder(made, threads, tuple(made.decoders.firing()[:2]), timed=True)
    rng = np.random.default_rng(0)
    for token in rng.integers(0, made.config.vocab_size, 40).tolist():
        decoder.step(token)
    found = decoder.fetched()
    bytes_ = {"in_proj": found.in_proj, "out_proj": found.out_proj, "head": found.head}
    bytes_ |= {"mixing": found.states, "rest": found.rest}
    return {name: (share, bytes_[name]) for name, share in decoder.parts().items()}


def integers(
    size: str, dense: SpikingMambaForCausalLM, states: str, texts: list[str] | None = None
) -> dict[str, EventDrivenMambaForCausalLM]:
    """Ours, dense and spiking, by the name of the way that each decodes; with int4 rounded for ``texts``."""
    made = {f"dense {weights}": event_driven(dense, weights, states) for weights in WEIGHTS}
    spiking = make(size, True)
    for name, shares in SHARES.items():
        if size != "7m" or name != "62%":  # the student's own thresholds give its own shares
            set_shares(spiking, shares)
        for weights in WEIGHTS:
            made[f"event-driven {weights}, {name}"] = event_driven(spiking, weights, states)
        if texts and name == "62%":
            rows = draw_rows(texts, load_tokenizer(QUICKSTART / "student"), 256, 128, "train")
            seen = torch.tensor(rows["input_ids"])
            mixed = event_driven(spiking, "int4", states, seen, TOLERANCE)
            made[f"event-driven int4 within {TOLERANCE:.1%}, {name}"] = mixed
    return made


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
    parser.add_argument(
        "--calibrate", nargs="+", help="of 7m, with int4 rounded for these texts, within 0.5%%"
    )
    parser.add_argument("--shapes", choices=SHAPES, help="the projections alone, at these shapes")
    parser.add_argument("--out", type=Path, help="a folder for a table, a picture and the numbers")
    args = parser.parse_args()
    quiet()
    if args.shapes:
        print(projections_alone(args.shapes, args.repeats))
        return
    if args.calibrate and args.size != "7m":
        parser.error("--calibrate is for --size 7m: weights at random have learned no text")
    torch.set_num_threads(args.threads)
    missing = [name for name in ("llama_cpp", "gguf") if importlib.util.find_spec(name) is None]
    if args.llama and missing:
        print(f"llama.cpp: not measured, since {' and '.join(missing)} cannot be imported")
    dense = make(args.size, False)
    with tempfile.TemporaryDirectory() as folder:
        ways = llama_ways(dense, Path(folder), args.threads) if args.llama and not missing else {}
        made = integers(args.size, dense, args.states, args.calibrate)
        ways |= {name: event_way(model, args.threads) for name, model in made.items()}
        if args.captured:
            ways["dense bfloat16, captured"] = captured_way(dense.to(torch.bfloat16))
        before = os.getloadavg()[0]
        rows = measure(ways, args.repeats, args.tokens)
        for row in rows:
            if args.parts and row["way"].startswith("event-driven"):
                row["parts"] = parts(made[row["way"]], args.threads)
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
        draw_speeds(rows, title, args.out / "decoding.png")


if __name__ == "__main__":
    main()
