"""Times the neurons against spikingjelly's and against the memory's speed, forward and backward.

    python recipes/benchmark/neuron_speed.py --out results           # a table, results/neurons.{json,png}
    python recipes/benchmark/neuron_speed.py --out results --sweep   # and the CuPy kernels' tuning parameters
    ncu ... python recipes/benchmark/neuron_speed.py --once   # each CuPy kernel of the table a few times

A time is the median over CUDA events around one forward and one backward pass, after warm-up. The L2 cache
is flushed before each, and the GPU is kept waiting for a millisecond meanwhile, so that the processor's
launches are hidden as they are in a training step; "looped" is the time of an iteration when nothing is
hidden or flushed. Floor: the bytes that must move, at the copy bandwidth measured in the same run.

spikingjelly's nodes keep V as their input is, and its fused kernels want V in float32: on bfloat16 its nodes
take a step at a time in Python. So its functions are timed too, with V in float32 ("fused"), and LIFNode as
its precision API prepares it.
"""

import argparse
import dataclasses
import gc
import json
import os
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from spikingjelly.activation_based import functional as sj_functional
from spikingjelly.activation_based import neuron as sj_neuron
from spikingjelly.activation_based.precision import PrecisionConfig, prepare_model_for_precision
from versions import about, line

from neurons import SignedSpikeCount, SILIFNode, compensation
from neurons.cupy.si_lif import kernel, ops
from spiking_mamba.common.errors import fail_clearly
from spiking_mamba.common.interruption import interruptible, measured_so_far
from spiking_mamba.reports.figures import picture

MI = 2**20
COUNT = SignedSpikeCount(4)


@dataclass(frozen=True)
class Row:
    name: str
    T: int
    N: int
    dtype: torch.dtype
    stateless: bool
    target_ms: float | None  # docs/benchmarks.md: to be reached on one H100
    compensated: bool = False  # SGC's smooth path mixed in: 'blend', 'scaled_tanh'

    @property
    def floor_bytes(self) -> float:
        """Bytes moved: input, spikes, both gradients, a bit an element written and read, the last potential.

        With SGC: input, spikes and mixture; the mixture's gradient, the input again, its gradient.
        """
        element = torch.finfo(self.dtype).bits // 8
        if self.compensated:
            return self.T * self.N * 6 * element
        return self.T * self.N * (4 * element + 0.25) + (0 if self.stateless else 4 * self.N)


ROWS = [
    Row("stateless, bf16, T=1, N=64Mi", 1, 64 * MI, torch.bfloat16, True, 0.24),
    Row("stateless, fp32, T=1, N=64Mi", 1, 64 * MI, torch.float32, True, 0.46),
    Row("node, bf16, T=1, N=64Mi", 1, 64 * MI, torch.bfloat16, False, 0.36),
    Row("node, fp32, T=1, N=64Mi", 1, 64 * MI, torch.float32, False, 0.58),
    Row("node, bf16, T=4, N=16Mi", 4, 16 * MI, torch.bfloat16, False, 0.26),
    Row("node, bf16, T=2048, N=24576", 2048, 24576, torch.bfloat16, False, 1.0),
    Row("node, fp32, T=2048, N=24576", 2048, 24576, torch.float32, False, None),
    Row("SGC blend, bf16, T=1, N=64Mi", 1, 64 * MI, torch.bfloat16, True, None, True),
    Row("SGC blend, fp32, T=1, N=64Mi", 1, 64 * MI, torch.float32, True, None, True),
]
SGC = ("blend", "scaled_tanh", 0.5)

Forward = Callable[[torch.Tensor], torch.Tensor]


def node_forward(node: torch.nn.Module) -> Forward:
    """A call on a fresh state, as at the start of every sequence."""
    node = node.cuda()

    def forward(x_seq: torch.Tensor) -> torch.Tensor:
        sj_functional.reset_net(node)
        return node(x_seq)

    return forward


def fused_ilif(x_seq: torch.Tensor) -> torch.Tensor:
    """ILIFNode's function on a fresh V in float32, as its kernel wants it."""
    return sj_functional.ilif_multi_step(x_seq, torch.zeros_like(x_seq[0], dtype=torch.float32), 4 / 3)[0]


def fused_lif(x_seq: torch.Tensor) -> torch.Tensor:
    """LIFNode's function, likewise."""
    return sj_functional.lif_multi_step(x_seq, torch.zeros_like(x_seq[0], dtype=torch.float32))[0]


def prepared_lif() -> Forward:
    """LIFNode as the precision API prepares it: V in bfloat16, in one kernel over all steps."""
    # tuned by keys, dtypes among them, that Triton cannot write to its cache of tuning results
    os.environ.pop("TRITON_CACHE_AUTOTUNING", None)
    config = PrecisionConfig(mode="bf16", neuron_storage="bf16")
    node = sj_neuron.LIFNode(step_mode="m")
    return node_forward(prepare_model_for_precision(node.cuda(), "cuda", config).model)


def straight_through(x: torch.Tensor) -> torch.Tensor:
    clamped = x.clamp(-4, 4)
    return clamped + (clamped.round() - clamped).detach()


def mixed_after(x: torch.Tensor) -> torch.Tensor:
    """The spikes by a kernel, SGC's mixture by torch."""
    return compensation.compensate(x, ops.signed_spike_count(x, 1.0, COUNT), *SGC, 4)


def ours(row: Row) -> Forward:
    if row.compensated:
        return lambda x: ops.compensated_spike_count(x, COUNT, *SGC)[1]
    if row.stateless:
        return lambda x: ops.signed_spike_count(x, 1.0, COUNT)
    return node_forward(SILIFNode(4, step_mode="m", backend="cupy"))


def contenders(row: Row) -> dict[str, Callable[[], Forward]]:
    def by_torch(x: torch.Tensor) -> torch.Tensor:
        return compensation.compensated_spike_count(x, COUNT, *SGC)[1]

    if row.compensated:
        return {
            "SI-LIF, cupy": lambda: ours(row),
            "cupy, mixed by torch": lambda: mixed_after,
            "SI-LIF, torch": lambda: by_torch,
            "compiled": lambda: torch.compile(by_torch),
        }
    made: dict[str, Callable[[], Forward]] = {
        "SI-LIF, cupy": lambda: ours(row),
        "SI-LIF, torch": lambda: node_forward(SILIFNode(4, step_mode="m")),
        "spikingjelly ILIFNode": lambda: node_forward(sj_neuron.ILIFNode(step_mode="m")),
        "spikingjelly LIFNode": lambda: node_forward(sj_neuron.LIFNode(step_mode="m")),
        "spikingjelly TernaryLIFNode": lambda: node_forward(sj_neuron.TernaryLIFNode(step_mode="m")),
    }
    if row.dtype == torch.bfloat16:
        made |= {
            "spikingjelly ILIF, fused": lambda: fused_ilif,
            "spikingjelly LIF, fused": lambda: fused_lif,
            "spikingjelly LIF, precision": prepared_lif,
        }
    if row.T == 1:
        made["compiled clamp and round"] = lambda: torch.compile(straight_through)
    return made


class Timer:
    """Medians of single passes. ``budget_s`` is what one measurement may take."""

    def __init__(self, budget_s: float = 0.4) -> None:
        self.budget_s = budget_s
        self.flush = torch.empty(
            2 * torch.cuda.get_device_properties(0).L2_cache_size, dtype=torch.uint8
        ).cuda()

    def median_ms(
        self, function: Callable[[], Any], split: Callable[[], Any] | None = None
    ) -> tuple[float, float]:
        """The medians of ``function()`` and, where given, of the ``split()`` that follows it."""
        begin = time.perf_counter()
        function()
        if split:
            split()
        torch.cuda.synchronize()
        once = time.perf_counter() - begin
        times = []
        for _ in range(max(3, min(60, int(self.budget_s / (once + 2e-3))))):
            marks = [torch.cuda.Event(enable_timing=True) for _ in range(3)]
            self.flush.zero_()
            torch.cuda._sleep(2_000_000)  # about 1 ms: the processor gets ahead
            marks[0].record()
            function()
            marks[1].record()
            if split:
                split()
            marks[2].record()
            times.append(marks)
        torch.cuda.synchronize()
        return (
            statistics.median(a.elapsed_time(b) for a, b, _ in times),
            statistics.median(b.elapsed_time(c) for _, b, c in times),
        )


def copy_bandwidth(timer: Timer) -> float:
    """Bytes read and written per second by a copy of 1 GiB."""
    source = torch.randn(256 * MI, device="cuda")
    target = torch.empty_like(source)
    ms, _ = timer.median_ms(lambda: target.copy_(source))
    return 2 * source.numel() * 4 / (ms * 1e-3)


def measure(row: Row, make: Callable[[], Forward], timer: Timer, limit_s: float) -> dict[str, Any]:
    """One contender on one row; ``skipped`` says why there is no time."""
    gc.collect()
    torch.cuda.empty_cache()
    try:
        forward = make()
        x = (torch.randn(row.T, row.N, device="cuda") * 2).to(row.dtype).requires_grad_()
        grad = torch.randn_like(forward(x).detach())
        out: list[torch.Tensor] = []

        def run_forward() -> None:
            out[:] = [forward(x)]

        def run_backward() -> None:
            torch.autograd.grad(out.pop(), x, grad)

        def both() -> None:
            run_forward()
            run_backward()

        both()  # compiles
        torch.cuda.synchronize()
        begin = time.perf_counter()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        both()
        torch.cuda.synchronize()
        once, peak = time.perf_counter() - begin, torch.cuda.max_memory_allocated() - before
        if once > limit_s:
            return {"skipped": f"one pass takes {once:.1f} s", "once_ms": once * 1e3}
        fwd, bwd = timer.median_ms(run_forward, run_backward)
        repeats = max(2, min(50, int(0.2 / once)))
        begin = time.perf_counter()
        for _ in range(repeats):
            both()
        torch.cuda.synchronize()
        looped = (time.perf_counter() - begin) / repeats * 1e3
        return {
            "ms": fwd + bwd,
            "forward_ms": fwd,
            "backward_ms": bwd,
            "looped_ms": looped,
            "peak_bytes": peak,
        }
    except Exception as error:  # a rival that fails is reported, not hidden
        return {
            "skipped": f"{type(error).__name__}: {str(error).splitlines()[0][:120] if str(error) else ''}"
        }


SWEEP: dict[str, list[int]] = {
    "block": [128, 256, 512],
    "wide_ring": [1, 2, 4],
    "vec_state": [4, 8],
    "vec_stateless": [4, 8],
    "tall_block": [32, 64, 128],
    "tall_ring": [16, 32, 64],
}


def sweep(timer: Timer) -> list[dict[str, Any]]:
    """One knob at a time around the defaults, on the rows that it can touch."""
    default, results = kernel.TUNING, []
    for knob, values in SWEEP.items():
        for row in ROWS:
            if row.compensated:
                continue
            tall = row.T == 2048
            if knob.startswith("tall") != tall or (knob == "wide_ring" and row.T != 4):
                continue
            if knob.startswith("vec") and (
                row.dtype != torch.bfloat16 or row.stateless != (knob == "vec_stateless")
            ):
                continue
            for value in values:
                kernel.TUNING = dataclasses.replace(default, **{knob: value})
                result = measure(row, lambda row=row: ours(row), timer, 5.0)
                results.append({"knob": knob, "value": value, "row": row.name, **result})
                text = result.get("skipped") or "{forward_ms:.3f} + {backward_ms:.3f} ms".format(**result)
                star = " (default)" if value == getattr(default, knob) else ""
                print(f"{knob:>14} = {value:<4} {row.name:<30} {text}{star}", flush=True)
    kernel.TUNING = default
    return results


def draw(report: dict[str, Any], path: Path) -> None:
    lines = -(-len(report["rows"]) // 2)
    with picture(path, 11, 2.7 * lines, dpi=110, nrows=lines, ncols=2, squeeze=False) as (figure, axes):
        for axis, row in zip(axes.flat, report["rows"], strict=False):
            timed = {k: v["ms"] for k, v in row["results"].items() if "ms" in v}
            names = list(timed)[::-1]
            colours = ["C1" if n == "SI-LIF, cupy" else "C0" for n in names]
            axis.barh(names, [timed[n] for n in names], color=colours)
            for i, n in enumerate(names):
                text = f" {timed[n]:#.3g}" if timed[n] < 100 else f" {timed[n]:.0f}"
                axis.text(timed[n], i, text, va="center")
            axis.axvline(row["floor_ms"], color="black", linestyle=":")
            axis.set_xscale("log")
            axis.set_xlim(row["floor_ms"] / 2, max([*timed.values(), row["floor_ms"]]) * 8)
            axis.set_title(row["name"], fontsize=10)
        for axis in axes[-1]:
            axis.set_xlabel("ms, forward and backward")
        for axis in axes.flat[len(report["rows"]) :]:
            axis.set_axis_off()
        figure.suptitle(f"{report['device']}, dotted: bytes at {report['copy_TB_per_s']:.2f} TB/s")


@fail_clearly()
def main() -> None:
    parser = argparse.ArgumentParser(description="Benchmark of the neurons (needs an NVIDIA GPU).")
    parser.add_argument("--out", type=Path, help="folder for neurons.json and neurons.png")
    parser.add_argument("--sweep", action="store_true", help="also sweep the tuning parameters")
    parser.add_argument(
        "--once", action="store_true", help="only run each CuPy row three times, for a profiler"
    )
    parser.add_argument("--rows", nargs="+", default=[""], help="those whose name has one of these in it")
    parser.add_argument("--limit", type=float, default=5.0, help="skip what takes more seconds a pass")
    args = parser.parse_args()
    if not torch.cuda.is_available():
        raise SystemExit("This benchmark needs an NVIDIA GPU.")

    if args.once:
        for row in ROWS:
            forward = ours(row)
            x = (torch.randn(row.T, row.N, device="cuda") * 2).to(row.dtype).requires_grad_()
            for _ in range(3):
                torch.autograd.grad(forward(x), x, torch.ones_like(x))
        torch.cuda.synchronize()
        return

    timer = Timer()
    bandwidth = copy_bandwidth(timer)
    report: dict[str, Any] = about() | {
        "copy_TB_per_s": bandwidth / 1e12,
        "tuning": dataclasses.asdict(kernel.TUNING),
        "rows": [],
    }
    print(f"{line()}; copy {bandwidth / 1e12:.2f} TB/s", flush=True)
    with interruptible(lambda: measured_so_far(report["rows"], args.out, "neurons.json")):
        run(args, report, timer, bandwidth)
    for row in report["rows"]:
        result = row["results"]["SI-LIF, cupy"]
        reached = "skipped" if "skipped" in result else f"{result['ms']:.3f} ms"
        print(f"{row['name']:<32} target {row['target_ms'] or '-':<5} measured {reached}")


def run(args: argparse.Namespace, report: dict[str, Any], timer: Timer, bandwidth: float) -> None:
    """Measure every row that is asked for, print it and add it to the report."""
    for row in (row for row in ROWS if any(part in row.name for part in args.rows)):
        floor_ms = row.floor_bytes / bandwidth * 1e3
        results = {name: measure(row, make, timer, args.limit) for name, make in contenders(row).items()}
        report["rows"].append(
            {"name": row.name, "T": row.T, "N": row.N, "floor_ms": floor_ms, "target_ms": row.target_ms}
            | {"floor_bytes": row.floor_bytes, "results": results}
        )
        print(f"\n{row.name}: floor {floor_ms:.3f} ms, target {row.target_ms or '-'} ms", flush=True)
        for name, r in results.items():
            if "skipped" in r:
                print(f"  {name:<28} skipped: {r['skipped']}", flush=True)
            else:
                split = f"{r['forward_ms']:.3f} + {r['backward_ms']:.3f}"
                share, peak = floor_ms / r["ms"], r["peak_bytes"] / MI
                looped = r["looped_ms"]
                print(f"  {name:<28} {r['ms']:9.3f} ms = {split}, looped {looped:.3f}", end="")
                print(f", {share:4.0%} of copy, peak {peak:.0f} MiB", flush=True)
        if args.out:  # after every row: a later failure loses nothing
            args.out.mkdir(parents=True, exist_ok=True)
            (args.out / "neurons.json").write_text(json.dumps(report, indent=1))
    if args.sweep:
        print("\nsweep", flush=True)
        report["sweep"] = sweep(timer)
    if args.out:
        (args.out / "neurons.json").write_text(json.dumps(report, indent=1))
        draw(report, args.out / "neurons.png")


if __name__ == "__main__":
    main()
