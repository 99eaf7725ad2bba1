"""Time all projections of a token on a GPU: event-driven, the same kernel with nothing skipped, and cuBLAS.

python recipes/benchmark/gpu_projections.py --size 1.3b [--shares 0.63 0.42 --batch 1 --out runs/projections]

Weights are random, every layer has its own, and a token's projections are one CUDA graph; figures are medians
of replays, in turn. `in_proj` and `out_proj` have the same share of inputs that fire. "Of copy bandwidth":
bytes of weights fetched over the time, beside a copy measured in the same run. Joules are NVML's, of the
whole GPU, with its idle power and without.
"""

import argparse
import json
import statistics
from collections.abc import Callable
from dataclasses import make_dataclass
from pathlib import Path

import torch
from decoding import copy_bytes_per_second
from gpu_tables import projections_table
from shares import projection_sizes

from neurons import EventDrivenLinear
from spiking_mamba import SpikingMambaConfig
from spiking_mamba.common.errors import fail_clearly
from spiking_mamba.common.machine import device_name
from spiking_mamba.common.provenance import provenance
from spiking_mamba.model.state_spaces import published_config
from spiking_mamba.spikes.joules import JouleMeter, NoEnergyCounter

Way = Callable[[], None]


def event_driven_way(config: SpikingMambaConfig, weights: str, batch: int, share: float) -> tuple[Way, float]:
    """A token's projections by spikes of which so many fire, and the bytes of weights that they fetch."""
    layers, fetched = [], 0.0
    for _ in range(config.num_hidden_layers):
        for inputs, outputs in projection_sizes(config):
            layer = EventDrivenLinear(inputs, outputs, bias=False, weights=weights, backend="cupy").cuda()
            low, high = (-127, 128) if weights == "int8" else (0, 256)
            layer.weight.copy_(torch.randint(low, high, layer.weight.shape, device="cuda"))
            spikes = torch.randint(1, 5, (batch, inputs), dtype=torch.int8, device="cuda")
            spikes *= (torch.rand(batch, inputs, device="cuda") < share).to(torch.int8)
            layers.append((layer, spikes))
            rows = (spikes != 0).any(0).sum().item()
            scales = 0 if layer.group_scale is None else layer.group_scale.numel()
            fetched += rows * layer.weight.shape[1] + scales

    def way() -> None:
        for layer, spikes in layers:
            layer.integer_sums(spikes)

    return way, fetched


def dense_way(config: SpikingMambaConfig, batch: int) -> tuple[Way, float]:
    """The same in bfloat16 by cuBLAS."""
    layers = []
    for _ in range(config.num_hidden_layers):
        for inputs, outputs in projection_sizes(config):
            weight = torch.randn(outputs, inputs, dtype=torch.bfloat16, device="cuda")
            layers.append((weight, torch.randn(batch, inputs, dtype=torch.bfloat16, device="cuda")))

    def way() -> None:
        for weight, x in layers:
            torch.nn.functional.linear(x, weight)

    return way, float(sum(2 * weight.numel() for weight, _ in layers))


def captured(way: Way) -> torch.cuda.CUDAGraph:
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            way()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        way()
    return graph


def milliseconds(graphs: dict[str, torch.cuda.CUDAGraph], repeats: int) -> dict[str, float]:
    """The median time of a replay, all in turn."""
    times: dict[str, list[float]] = {name: [] for name in graphs}
    for repeat in range(repeats + 5):
        for name, graph in graphs.items():
            marks = [torch.cuda.Event(enable_timing=True) for _ in range(2)]
            marks[0].record()
            graph.replay()
            marks[1].record()
            torch.cuda.synchronize()
            if repeat >= 5:
                times[name].append(marks[0].elapsed_time(marks[1]))
    return {name: statistics.median(seconds) for name, seconds in times.items()}


def millijoules(graph: torch.cuda.CUDAGraph, milliseconds: float, seconds: float) -> dict[str, float]:
    """Of a replay: idle power included, and without it. Nothing where nothing counts them."""
    replays = max(1, round(1e3 * seconds / milliseconds))
    try:
        meter = JouleMeter(idle_seconds=1.0)
    except NoEnergyCounter as error:
        print(error)
        return {}
    with meter:
        for _ in range(replays):
            graph.replay()
        torch.cuda.synchronize()
    measured = meter.result(replays)
    return {"mJ": 1e3 * measured["joules_total_per_token"], "mJ_net": 1e3 * measured["joules_net_per_token"]}


@fail_clearly()
def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--size", default="1.3b")
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--shares", type=float, nargs="+", default=[0.63, 0.42])
    parser.add_argument("--repeats", type=int, default=50)
    parser.add_argument("--seconds", type=float, default=2.0, help="of each for joules; 0: none")
    parser.add_argument("--out", help="a folder for the numbers and the table")
    args = parser.parse_args()
    torch.manual_seed(0)
    config = published_config(f"state-spaces/mamba2-{args.size}")
    ways = {"dense, bf16, cuBLAS": dense_way(config, args.batch)}
    for weights in ("int8", "int4"):
        for share in (1.0, *args.shares):
            name = f"{weights}, {share:.0%} of the inputs fire"
            ways[name] = event_driven_way(config, weights, args.batch, share)
    graphs = {name: captured(way) for name, (way, _) in ways.items()}
    times, copy = milliseconds(graphs, args.repeats), copy_bytes_per_second()
    records = []
    for name, graph in graphs.items():
        speed = ways[name][1] / (times[name] / 1e3)
        record = {"way": name, "ms": times[name], "bytes": ways[name][1], "of_copy": speed / copy}
        record |= millijoules(graph, times[name], args.seconds) if args.seconds else {}
        records.append(record)
    about = {"provenance": provenance(make_dataclass("Arguments", vars(args))(**vars(args)))}
    about |= {"copy_bytes_per_second": copy, "rows": records}
    print(f"{device_name()}, copy {copy / 1e12:.2f} TB/s\n\n{projections_table(about)}")
    if args.out:
        folder = Path(args.out)
        folder.mkdir(parents=True, exist_ok=True)
        (folder / f"projections-{args.size}-{args.batch}.json").write_text(json.dumps(about, indent=1))


if __name__ == "__main__":
    main()
